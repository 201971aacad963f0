"""Folders of token files, as `fastattn data tokenize` and `fastattn data shard` write them."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..messages import UsageError
from .documents import PARTS
from .token_file import SUFFIX, open_tokens
from .tokenizer import load_tokenizer


class Shards:
    """Several tensors of tokens, read as one: `len`, and an index that is a slice or a tensor of positions."""

    def __init__(self, tensors):
        self.tensors = tensors
        self.ends = torch.tensor([len(tensor) for tensor in tensors]).cumsum(0)

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, index):
        if len(self.tensors) == 1:
            return self.tensors[0][index]
        if isinstance(index, slice):
            index = torch.arange(*index.indices(len(self)))
        shard = torch.searchsorted(self.ends, index, right=True)
        result = torch.empty(index.shape, dtype=torch.int32)
        for number in shard.unique().tolist():
            here = shard == number
            first = int(self.ends[number]) - len(self.tensors[number])
            result[here] = self.tensors[number][index[here] - first]
        return result

    def count(self, number):
        """How often a token occurs."""
        return sum(int((tensor == number).sum()) for tensor in self.tensors)


class TokenFolder(NamedTuple):
    """tokenizer; splits: {part: Shards}; ends: {part: (documents,) int64, the ends of documents}; sha256: of a part."""

    tokenizer: object
    splits: dict
    ends: dict
    sha256: str


def is_token_folder(path):
    return any((path / f"train{middle}{SUFFIX}").is_file() for middle in ("", "-00000"))


def open_token_folder(folder, with_ends=False):
    """The TokenFolder of a path; with_ends: also read the ends of documents, 8 bytes each.

    Raises:
        UsageError: the folder has no training or validation part, or a file is missing or damaged.
    """
    if not is_token_folder(folder):
        raise UsageError(f"tokens {str(folder)!r}: there is no train{SUFFIX} or train-00000{SUFFIX}")
    files = {name: _files(folder, name) for name in PARTS}
    files = {name: paths for name, paths in files.items() if paths}
    if "validation" not in files:
        raise UsageError(
            f"tokens {str(folder)!r}: there is no validation{SUFFIX} next to train{SUFFIX}; tokenize the "
            "folder that `fastattn data split` wrote"
        )
    splits = {name: Shards(list(map(open_tokens, paths))) for name, paths in files.items()}
    ends = {name: _ends(paths, splits[name]) for name, paths in files.items()} if with_ends else {}
    content = b"".join(splits[name][:1_000_000].numpy().tobytes() for name in splits)
    sha256 = hashlib.sha256(content).hexdigest()[:16]
    return TokenFolder(load_tokenizer(folder / "tokenizer.json"), splits, ends, sha256)


def _files(folder, name):
    if (folder / f"{name}{SUFFIX}").is_file():
        return [folder / f"{name}{SUFFIX}"]
    found = sorted(folder.glob(f"{name}-*{SUFFIX}"))
    try:
        expected = json.loads((folder / "data.json").read_text(encoding="utf-8"))[name]["shards"] if found else 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / 'data.json'} must say how many shards {name} has, got {error!r}") from None
    if len(found) != expected:
        raise UsageError(f"tokens {str(folder)!r}: {name} must have {expected} files, got {len(found)}")
    return found


def _ends(paths, shards):
    ends, first = [], 0
    for path, tensor in zip(paths, shards.tensors, strict=True):
        try:
            here = np.fromfile(path.with_suffix(".ends"), "<i8")
        except OSError as error:
            raise UsageError(f"{path.with_suffix('.ends')} cannot be read: {error.strerror}") from None
        if not len(here) or here[-1] != len(tensor) or (np.diff(here, prepend=0) < 0).any():
            raise UsageError(f"{path.with_suffix('.ends')} does not belong to {path.name}")
        ends.append(torch.from_numpy(here) + first)
        first += len(tensor)
    return torch.cat(ends)


def join_folders(weights, with_ends=False):
    """(TokenFolder of several folders, one after the other; {part: [tokens of each folder]}).

    Raises:
        UsageError: as open_token_folder, or the tokenizers differ.
    """
    folders = {path: open_token_folder(Path(path), with_ends) for path in weights}
    first = next(iter(folders.values()))
    if len(folders) == 1:
        return first, {part: [len(tokens)] for part, tokens in first.splits.items()}
    for path, folder in folders.items():
        if folder.tokenizer.to_json() != first.tokenizer.to_json():
            raise UsageError(
                f"tokens {path!r} and {next(iter(folders))!r} were not made by the same tokenizer; write them with"
                " --tokenizer_file"
            )
    splits, ends = {}, {}
    for part in PARTS:
        having = [folder for folder in folders.values() if part in folder.splits]
        if having:
            splits[part] = Shards([tensor for folder in having for tensor in folder.splits[part].tensors])
            if with_ends:
                starts = np.cumsum([0, *(len(folder.splits[part]) for folder in having)])
                ends[part] = torch.cat([f.ends[part] + int(at) for f, at in zip(having, starts, strict=False)])
    sha256 = hashlib.sha256("".join(folder.sha256 for folder in folders.values()).encode()).hexdigest()[:16]
    sizes = {part: [len(folder.splits.get(part, ())) for folder in folders.values()] for part in splits}
    return TokenFolder(first.tokenizer, splits, ends, sha256), sizes
