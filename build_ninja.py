"""Writing and running the build.ninja of a build of fastattn."""

import os
import pathlib
import platform
import re
import shlex
import subprocess

from build_environment import CXX, PACKAGE, first_match, ninja_command

RULES = """\
ninja_required_version = 1.5
rule cxx
  command = {cxx} -MMD -MF $out.d -O3 -g0 -fPIC -std=c++20 -fvisibility=hidden -Wall $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = CXX $out
rule nvcc
  command = {nvcc} {ccbin} -MMD -MF $out.d -O3 -std=c++17 -lineinfo -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -v $
      $flags -c $in -o $out > $out.log 2>&1 || (cat $out.log; exit 1)
  depfile = $out.d
  deps = gcc
  description = NVCC $out
rule stub
  command = echo | {cxx} -shared -fPIC -Wl,-soname,$soname -x c++ - -o $out
  description = STUB $soname
rule link
  command = {cxx} -shared -o $out $in $flags
  description = LINK $out
"""

# Functions of other libraries that glibc 2.34 moved into libc, with a new version. A library that is linked to stubs of
# the old libraries asks for their first version, which every glibc has.
MOVED_INTO_LIBC = {
    "libdl.so.2": "dlclose dlerror dlmopen dlopen dlsym dlvsym",
    "libpthread.so.0": "pthread_condattr_setpshared pthread_create pthread_detach pthread_getspecific pthread_join"
    " pthread_key_create pthread_key_delete pthread_kill pthread_mutex_trylock pthread_mutexattr_destroy"
    " pthread_mutexattr_init pthread_mutexattr_setpshared pthread_mutexattr_settype pthread_once"
    " pthread_rwlock_destroy pthread_rwlock_init pthread_rwlock_rdlock pthread_rwlock_timedrdlock"
    " pthread_rwlock_timedwrlock pthread_rwlock_tryrdlock pthread_rwlock_trywrlock pthread_rwlock_unlock"
    " pthread_rwlock_wrlock pthread_rwlockattr_destroy pthread_rwlockattr_init pthread_rwlockattr_setpshared"
    " pthread_setspecific pthread_spin_destroy pthread_spin_init pthread_spin_lock pthread_spin_trylock"
    " pthread_spin_unlock sem_destroy sem_init sem_post sem_timedwait sem_trywait sem_wait",
    "librt.so.1": "shm_open shm_unlink",
}
# Not the directory in which ninja runs the compilers: nvcc makes its programs search that one for libraries, and they
# crash with these.
GLIBC_STUBS = pathlib.Path("glibc_stubs")
FIRST_VERSIONS = {  # as scripts of the linker
    "x86_64": "GLIBC_2.2.5 { global: *; };\nGLIBC_2.3.4 { global: dlmopen; } GLIBC_2.2.5;\n",
    "aarch64": "GLIBC_2.17 { global: *; };\n",
}


class NinjaFile:
    """A build.ninja under construction; it runs in its own directory, where objects mirror the source tree."""

    def __init__(self, root, nvcc):
        self.root = root
        self.glibc = []  # what stubs_of_glibc returns
        # nvcc uses the C++ compiler on PATH, unless CXX names another
        ccbin = f"-ccbin {CXX}" if os.environ.get("CXX") and " " not in CXX else ""
        self.text = RULES.format(cxx=CXX, nvcc=shlex.quote(str(nvcc)), ccbin=ccbin)
        self.map = root / "csrc/older_systems.map"
        self.hidden = f"-Wl,--version-script={shlex.quote(str(self.map))}"
        self.older_systems = self.compile("cxx", root / "csrc/older_systems.cpp", "")  # every library holds it

    def add(self, output, rule, inputs, implicit=(), **variables):
        inputs, implicit = (
            " ".join(re.sub(r"[$ :]", r"$\g<0>", str(path)) for path in paths) for paths in (inputs, implicit)
        )
        self.text += f"build {output}: {rule} {inputs} | {implicit}\n"
        for name, value in variables.items():
            self.text += f"  {name} = {value}\n"
        return output

    def compile(self, rule, source, flags, variant=""):
        suffix = f".{variant}.o" if variant else ".o"
        return self.add(source.relative_to(self.root).with_suffix(suffix), rule, [source], flags=flags)

    def stub(self, soname):
        """An empty library, which gives DT_NEEDED on torch's library without that torch at link time."""
        return self.add(soname, "stub", [], soname=soname)

    def library(self, name, objects, libraries, flags=""):
        """A shared library that depends on `libraries`, even if it uses no symbol of them, as the stubs have none."""
        needed = f"{self.hidden} -Wl,--no-as-needed {' '.join(libraries)} -Wl,--as-needed -Wl,-rpath,'$$ORIGIN'"
        self.add(
            name,
            "link",
            [*objects, self.older_systems],
            [*libraries, *self.glibc, self.map],
            flags=f"-Wl,-soname,{name} {needed} {flags} {' '.join(self.glibc)}",
        )


def include(*directories, system=True):
    return " ".join(f"{'-isystem' if system else '-I'} {shlex.quote(str(directory))}" for directory in directories)


def write_if_changed(path, text):
    """Write a generated source; its timestamp decides what is compiled again."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def stubs_of_glibc(ninja, build_dir):
    """The stubs for MOVED_INTO_LIBC; none on a processor family or with a C library that has no entry here."""
    script = FIRST_VERSIONS.get(platform.machine())
    if script is None or platform.libc_ver()[0] != "glibc":
        return []
    versions = build_dir / "first_glibc.map"
    write_if_changed(versions, script)
    flags = f"-fPIC -Wl,--version-script={shlex.quote(str(versions))}"
    for soname, names in MOVED_INTO_LIBC.items():
        source = build_dir / f"{soname}.cpp"
        write_if_changed(source, "".join(f'extern "C" void {name}() {{}}\n' for name in names.split()))
        ninja.add(GLIBC_STUBS / soname, "link", [source], flags=f"{flags} -Wl,-soname,{soname}")
    return [str(GLIBC_STUBS / soname) for soname in MOVED_INTO_LIBC]


def job_count():
    """MAX_JOBS, or one compiler per usable core and per 2 GiB of available memory."""
    wanted = os.environ.get("MAX_JOBS") or "auto"
    if wanted.isdigit():
        return max(1, int(wanted))
    if wanted != "auto":
        raise SystemExit(f"{PACKAGE}: MAX_JOBS must be a number, got {wanted!r}")
    available_kib = int(first_match(r"MemAvailable: *(\d+)", pathlib.Path("/proc/meminfo").read_text()) or 2**21)
    return max(1, min(len(os.sched_getaffinity(0)), available_kib // 2**21))


def run_ninja(build_dir, *targets):
    """Build targets, each as far as possible; returns None, or the part of the output that explains the failure."""
    command = [*ninja_command(), "-C", str(build_dir), f"-j{job_count()}", "-k0", *targets]
    lines = []
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line)
    except OSError as error:
        return f"ninja does not start: {error}"
    if process.returncode == 0:
        return None
    first = next((i for i, line in enumerate(lines) if line.startswith("FAILED")), 0)
    return "".join(lines[first : first + 40])
