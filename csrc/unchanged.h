#pragma once
// fastattn._C.unchanged: whether what was read from Python objects is still what they hold.
#include <Python.h>

namespace fastattn {

constexpr char kUnchangedDoc[] =
    "unchanged((objects, entries, sizes)) -> bool.\n\n"
    "objects: object, type, __dict__, ... entries: dict, key, value, ..., compared by identity; the value Ellipsis\n"
    "stands for a key that must be absent. sizes: dict, key, size, ... of a dict that another dict holds.";

inline bool holds_objects(PyObject* objects) {
  for (Py_ssize_t i = 0; i + 2 < PyTuple_GET_SIZE(objects); i += 3) {
    PyObject* object = PyTuple_GET_ITEM(objects, i);
    if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != PyTuple_GET_ITEM(objects, i + 1)) {
      return false;
    }
    PyObject* dict = PyObject_GenericGetDict(object, nullptr);
    Py_XDECREF(dict);  // the object holds it
    if (dict != PyTuple_GET_ITEM(objects, i + 2)) {
      return false;
    }
  }
  return true;
}

inline bool holds_entries(PyObject* entries) {
  for (Py_ssize_t i = 0; i + 2 < PyTuple_GET_SIZE(entries); i += 3) {
    PyObject* expected = PyTuple_GET_ITEM(entries, i + 2);
    PyObject* found = PyDict_GetItemWithError(PyTuple_GET_ITEM(entries, i), PyTuple_GET_ITEM(entries, i + 1));
    if (found != (expected == Py_Ellipsis ? nullptr : expected)) {
      return false;
    }
  }
  return true;
}

inline bool holds_sizes(PyObject* sizes) {
  for (Py_ssize_t i = 0; i + 2 < PyTuple_GET_SIZE(sizes); i += 3) {
    PyObject* dict = PyDict_GetItemWithError(PyTuple_GET_ITEM(sizes, i), PyTuple_GET_ITEM(sizes, i + 1));
    if (!dict || !PyDict_Check(dict) || PyDict_Size(dict) != PyLong_AsSsize_t(PyTuple_GET_ITEM(sizes, i + 2))) {
      return false;
    }
  }
  return true;
}

inline PyObject* unchanged(PyObject*, PyObject* watched) {
  if (!PyTuple_Check(watched) || PyTuple_GET_SIZE(watched) != 3) {
    PyErr_SetString(PyExc_TypeError, "unchanged: expected a tuple of three tuples");
    return nullptr;
  }
  for (Py_ssize_t i = 0; i < 3; ++i) {
    if (!PyTuple_Check(PyTuple_GET_ITEM(watched, i))) {
      PyErr_SetString(PyExc_TypeError, "unchanged: expected a tuple of three tuples");
      return nullptr;
    }
  }
  const bool holds = holds_objects(PyTuple_GET_ITEM(watched, 0)) && holds_entries(PyTuple_GET_ITEM(watched, 1)) &&
                     holds_sizes(PyTuple_GET_ITEM(watched, 2));
  return PyErr_Occurred() ? nullptr : PyBool_FromLong(holds);
}

}  // namespace fastattn
