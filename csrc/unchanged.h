#pragma once
// fastattn._C.unchanged: the parameters of a module, if all that was read of it and of its children still holds.
//
// Nothing here owns a parameter, a module or the dict of one: all of them are found from the module of the call. So a
// layer that keeps what it read is freed with its last reference, and a parameter as soon as another takes its place.
#include <Python.h>

namespace fastattn {

constexpr char kUnchangedDoc[] =
    "unchanged(module, (parameter type, parts, lists)) -> list of lists of parameters, or None.\n\n"
    "parts: for the module and then for each child (index of its parent, name, type, entries, parameters, children,\n"
    "hooks). entries: key, value, ... of its __dict__, compared by identity; the value Ellipsis stands for a key that\n"
    "must be absent. parameters and children: name, whether it is not None, ... of all of them. hooks: names of dicts\n"
    "that must be empty. lists: for each list (index of a part, name, ...); after the index -1 comes the object "
    "itself.";

constexpr Py_ssize_t kMostParts = 32;

struct Part {
  PyObject *parameters, *children;  // dicts
};

// The value of a key, or null. All references here are borrowed: no code runs that could release them.
inline PyObject* value_of(PyObject* dict, PyObject* key) {
  return PyDict_GetItemWithError(dict, key);
}

inline PyObject* dict_of(PyObject* dict, PyObject* key) {
  PyObject* found = key ? value_of(dict, key) : nullptr;
  return found && PyDict_Check(found) ? found : nullptr;
}

inline bool holds_entries(PyObject* state, PyObject* entries) {
  for (Py_ssize_t i = 0; i + 1 < PyTuple_GET_SIZE(entries); i += 2) {
    PyObject* expected = PyTuple_GET_ITEM(entries, i + 1);
    if (value_of(state, PyTuple_GET_ITEM(entries, i)) != (expected == Py_Ellipsis ? nullptr : expected)) {
      return false;
    }
  }
  return true;
}

// Whether a dict has these names and no others, each with None or with a value of the type, unless the type is null.
inline bool holds_names(PyObject* dict, PyObject* names, PyObject* type) {
  if (2 * PyDict_Size(dict) != PyTuple_GET_SIZE(names)) {
    return false;
  }
  for (Py_ssize_t i = 0; i + 1 < PyTuple_GET_SIZE(names); i += 2) {
    PyObject* found = value_of(dict, PyTuple_GET_ITEM(names, i));
    if (!found || (found != Py_None) != (PyTuple_GET_ITEM(names, i + 1) == Py_True)) {
      return false;
    }
    if (type && found != Py_None && reinterpret_cast<PyObject*>(Py_TYPE(found)) != type) {
      return false;
    }
  }
  return true;
}

inline bool has_hooks(PyObject* state, PyObject* names) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names); ++i) {
    PyObject* hooks = dict_of(state, PyTuple_GET_ITEM(names, i));
    if (!hooks || PyDict_Size(hooks) != 0) {
      return true;
    }
  }
  return false;
}

// Whether a module is as its part says; `found` receives its dicts.
inline bool holds_part(PyObject* module, PyObject* part, PyObject* parameter_type, Part& found) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != PyTuple_GET_ITEM(part, 2)) {
    return false;
  }
  PyObject* state = PyObject_GenericGetDict(module, nullptr);
  if (!state) {
    return false;
  }
  Py_DECREF(state);  // the module holds it
  static PyObject* const names[] = {PyUnicode_InternFromString("_parameters"), PyUnicode_InternFromString("_modules")};
  found = {dict_of(state, names[0]), dict_of(state, names[1])};
  return found.parameters && found.children && holds_entries(state, PyTuple_GET_ITEM(part, 3)) &&
         holds_names(found.parameters, PyTuple_GET_ITEM(part, 4), parameter_type) &&
         holds_names(found.children, PyTuple_GET_ITEM(part, 5), nullptr) &&
         !has_hooks(state, PyTuple_GET_ITEM(part, 6));
}

inline bool are_parts(PyObject* plan) {
  if (!PyTuple_Check(plan) || PyTuple_GET_SIZE(plan) != 3 || !PyTuple_Check(PyTuple_GET_ITEM(plan, 1)) ||
      !PyTuple_Check(PyTuple_GET_ITEM(plan, 2)) || PyTuple_GET_SIZE(PyTuple_GET_ITEM(plan, 1)) > kMostParts) {
    return false;
  }
  PyObject* lists = PyTuple_GET_ITEM(plan, 2);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(lists); ++i) {
    if (!PyTuple_Check(PyTuple_GET_ITEM(lists, i))) {
      return false;
    }
  }
  PyObject* parts = PyTuple_GET_ITEM(plan, 1);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(parts); ++i) {
    PyObject* part = PyTuple_GET_ITEM(parts, i);
    if (!PyTuple_Check(part) || PyTuple_GET_SIZE(part) != 7) {
      return false;
    }
    for (Py_ssize_t j = 3; j < 7; ++j) {
      if (!PyTuple_Check(PyTuple_GET_ITEM(part, j))) {
        return false;
      }
    }
  }
  return true;
}

// The index of a part before `end`, or -1.
inline Py_ssize_t part_index(PyObject* number, Py_ssize_t end) {
  const Py_ssize_t index = PyLong_AsSsize_t(number);
  return index < end ? index : -1;
}

// One of the lists, or null.
inline PyObject* parameter_list(PyObject* wanted, const Part* parts, Py_ssize_t n_parts) {
  const Py_ssize_t n = PyTuple_GET_SIZE(wanted) / 2;
  PyObject* list = PyList_New(n);
  for (Py_ssize_t i = 0; list && i < n; ++i) {
    PyObject *number = PyTuple_GET_ITEM(wanted, 2 * i), *found = PyTuple_GET_ITEM(wanted, 2 * i + 1);
    const Py_ssize_t part = PyLong_AsSsize_t(number);
    if (part != -1 || PyErr_Occurred()) {
      found = part < 0 || part >= n_parts ? nullptr : value_of(parts[part].parameters, found);
    }
    if (!found) {
      Py_CLEAR(list);
      break;
    }
    Py_INCREF(found);
    PyList_SET_ITEM(list, i, found);
  }
  return list;
}

inline PyObject* parameter_lists(PyObject* lists, const Part* parts, Py_ssize_t n_parts) {
  const Py_ssize_t n = PyTuple_GET_SIZE(lists);
  PyObject* found = PyList_New(n);
  for (Py_ssize_t i = 0; found && i < n; ++i) {
    PyObject* list = parameter_list(PyTuple_GET_ITEM(lists, i), parts, n_parts);
    if (!list) {
      Py_CLEAR(found);
      break;
    }
    PyList_SET_ITEM(found, i, list);
  }
  return found;
}

inline PyObject* unchanged(PyObject*, PyObject* const* args, Py_ssize_t n_args) {
  if (n_args != 2 || !are_parts(args[1])) {
    PyErr_SetString(PyExc_TypeError, "unchanged: expected a module and (type, parts, lists)");
    return nullptr;
  }
  PyObject *type = PyTuple_GET_ITEM(args[1], 0), *plan = PyTuple_GET_ITEM(args[1], 1);
  const Py_ssize_t n = PyTuple_GET_SIZE(plan);
  Part parts[kMostParts];
  bool holds = true;
  for (Py_ssize_t i = 0; holds && i < n; ++i) {
    PyObject *part = PyTuple_GET_ITEM(plan, i), *module = args[0];
    if (i > 0) {
      const Py_ssize_t parent = part_index(PyTuple_GET_ITEM(part, 0), i);
      module = parent < 0 ? nullptr : value_of(parts[parent].children, PyTuple_GET_ITEM(part, 1));
    }
    holds = module && holds_part(module, part, type, parts[i]);
  }
  PyObject* found = holds ? parameter_lists(PyTuple_GET_ITEM(args[1], 2), parts, n) : nullptr;
  if (found || PyErr_Occurred()) {
    return found;
  }
  Py_RETURN_NONE;
}

}  // namespace fastattn
