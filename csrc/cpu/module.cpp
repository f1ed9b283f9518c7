// The Python module `_cpu` (stable ABI): ops by handle, step graphs, threads. Arguments are packed into 8-byte slots.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <cstring>
#include <string>
#include <vector>

#include "graph.h"
#include "op.h"

namespace {

constexpr int64_t kRegionNanoseconds = 6000;   // less work than this is not worth waking the pool
constexpr int64_t kReleaseNanoseconds = 20000;  // nor, below this, giving up the interpreter lock

int level_limit = -1;                              // -1: the best that the CPU can run
thread_local phl::Graph* recording = nullptr;      // the graph that this thread's calls are appended to

int current_level() {
  const int best = phl::best_level();
  return level_limit >= 0 && level_limit < best ? level_limit : best;
}

struct Call {
  const phl::OpEntry* op;
  const uint64_t* slots;
};

void run_call(void* context, phl::Team& team) {
  const Call& call = *static_cast<Call*>(context);
  call.op->run(call.slots, team);
}

bool pack_slot(char kind, PyObject* value, uint64_t* slot) {
  if (kind == 'd') {
    const double number = PyFloat_AsDouble(value);
    std::memcpy(slot, &number, 8);
  } else if (kind == 'p' && value == Py_None) {
    *slot = 0;
  } else {
    const long long number = PyLong_AsLongLong(value);
    std::memcpy(slot, &number, 8);
  }
  return PyErr_Occurred() == nullptr;
}

bool pack(const phl::OpEntry& op, PyObject* const* args, Py_ssize_t count, uint64_t* slots) {
  Py_ssize_t used = 0;
  for (const char* kind = op.signature; *kind != '\0'; ++kind) {
    if (*kind == ' ') continue;
    if (used == count) break;
    if (!pack_slot(*kind, args[used], slots + used)) return false;
    ++used;
  }
  if (used == op.slots && used == count) return true;
  PyErr_Format(PyExc_TypeError, "%s takes %d arguments, not %zd", op.name, op.slots, count);
  return false;
}

// call(handle, work, *slots)
PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count < 2) {
    PyErr_SetString(PyExc_TypeError, "call(handle, work, *arguments)");
    return nullptr;
  }
  const long handle = PyLong_AsLong(args[0]);
  const long long work = PyLong_AsLongLong(args[1]);
  if (PyErr_Occurred()) return nullptr;
  if (handle < 0 || handle >= phl::op_count()) {
    PyErr_SetString(PyExc_IndexError, "no such op");
    return nullptr;
  }
  const phl::OpEntry& op = phl::op_at(static_cast<int>(handle));
  uint64_t slots[phl::kMaxSlots];
  if (!pack(op, args + 2, count - 2, slots)) return nullptr;
  if (recording != nullptr) {
    recording->append(&op, work, slots);
    if (!recording->runs) Py_RETURN_NONE;
  }
  if (work < kRegionNanoseconds) {
    phl::Team alone;
    op.run(slots, alone);
    Py_RETURN_NONE;
  }
  Call region{&op, slots};
  if (work < kReleaseNanoseconds) {
    phl::run_region(run_call, &region);
  } else {
    Py_BEGIN_ALLOW_THREADS
    phl::run_region(run_call, &region);
    Py_END_ALLOW_THREADS
  }
  Py_RETURN_NONE;
}

PyObject* op(PyObject*, PyObject* name) {
  PyObject* bytes = PyUnicode_AsUTF8String(name);
  if (bytes == nullptr) return nullptr;
  const phl::OpEntry* entry = phl::find_op(PyBytes_AsString(bytes), current_level());
  Py_DECREF(bytes);
  if (entry == nullptr) return PyErr_Format(PyExc_KeyError, "no native op %R at this level", name);
  return PyLong_FromLong(static_cast<long>(entry - &phl::op_at(0)));
}

PyObject* ops(PyObject*, PyObject*) {
  PyObject* list = PyList_New(0);
  for (int i = 0; list != nullptr && i < phl::op_count(); ++i) {
    const phl::OpEntry& entry = phl::op_at(i);
    PyObject* row = Py_BuildValue("(sss)", entry.name, phl::kLevelNames[entry.level], entry.signature);
    if (row == nullptr || PyList_Append(list, row) != 0) {
      Py_XDECREF(row);
      Py_DECREF(list);
      return nullptr;
    }
    Py_DECREF(row);
  }
  return list;
}

PyObject* levels(PyObject*, PyObject*) {
  PyObject* tuple = PyTuple_New(phl::best_level() + 1);
  for (int i = 0; tuple != nullptr && i <= phl::best_level(); ++i) {
    PyTuple_SetItem(tuple, i, PyUnicode_FromString(phl::kLevelNames[i]));
  }
  return tuple;
}

PyObject* set_level(PyObject*, PyObject* name) {
  if (name == Py_None) {
    level_limit = -1;
    Py_RETURN_NONE;
  }
  for (int i = 0; i <= phl::best_level(); ++i) {
    PyObject* known = PyUnicode_FromString(phl::kLevelNames[i]);
    const int same = known == nullptr ? -1 : PyUnicode_Compare(known, name);
    Py_XDECREF(known);
    if (PyErr_Occurred()) return nullptr;
    if (same == 0) {
      level_limit = i;
      Py_RETURN_NONE;
    }
  }
  return PyErr_Format(PyExc_ValueError, "this CPU cannot run level %R", name);
}

PyObject* level(PyObject*, PyObject*) { return PyUnicode_FromString(phl::kLevelNames[current_level()]); }

PyObject* set_threads(PyObject*, PyObject* count) {
  const long threads = PyLong_AsLong(count);
  if (PyErr_Occurred()) return nullptr;
  if (threads < 1 || threads > 1024) {
    return PyErr_Format(PyExc_ValueError, "threads must be 1 to 1024, not %ld", threads);
  }
  Py_BEGIN_ALLOW_THREADS
  phl::set_threads(static_cast<int>(threads));
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

PyObject* worker_ids(PyObject*, PyObject*) {
  const std::vector<int64_t> ids = phl::worker_ids();
  PyObject* list = PyList_New(static_cast<Py_ssize_t>(ids.size()));
  for (size_t i = 0; list != nullptr && i < ids.size(); ++i) {
    PyList_SetItem(list, static_cast<Py_ssize_t>(i), PyLong_FromLongLong(ids[i]));
  }
  return list;
}

PyObject* threads(PyObject*, PyObject*) { return PyLong_FromLong(phl::num_threads()); }

constexpr const char* kGraphName = "phloem.graph";

void free_graph(PyObject* capsule) {
  delete static_cast<phl::Graph*>(PyCapsule_GetPointer(capsule, kGraphName));
}

// record_begin(run): with a false `run`, calls are recorded without being carried out.
PyObject* record_begin(PyObject*, PyObject* run) {
  const int runs = PyObject_IsTrue(run);
  if (runs < 0) return nullptr;
  if (recording != nullptr) {
    PyErr_SetString(PyExc_RuntimeError, "this thread is already recording a step");
    return nullptr;
  }
  recording = new phl::Graph;
  recording->runs = runs != 0;
  Py_RETURN_NONE;
}

// Ends the recording and returns the graph; with no recording, None.
PyObject* record_end(PyObject*, PyObject*) {
  if (recording == nullptr) Py_RETURN_NONE;
  recording->finish();
  PyObject* capsule = PyCapsule_New(recording, kGraphName, free_graph);
  if (capsule == nullptr) delete recording;
  recording = nullptr;
  return capsule;
}

phl::Graph* graph_of(PyObject* capsule) {
  return static_cast<phl::Graph*>(PyCapsule_GetPointer(capsule, kGraphName));
}

PyObject* replay(PyObject*, PyObject* capsule) {
  phl::Graph* graph = graph_of(capsule);
  if (graph == nullptr) return nullptr;
  Py_BEGIN_ALLOW_THREADS
  graph->replay();
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

// calls(graph) -> [(op name, signature, arguments as the bytes of 8-byte slots)]
PyObject* calls(PyObject*, PyObject* capsule) {
  const phl::Graph* graph = graph_of(capsule);
  if (graph == nullptr) return nullptr;
  PyObject* list = PyList_New(0);
  for (size_t i = 0; list != nullptr && i < graph->records.size(); ++i) {
    const phl::Record& record = graph->records[i];
    const auto* first = reinterpret_cast<const char*>(graph->slots.data() + record.first_slot);
    PyObject* row = Py_BuildValue("(ssy#)", record.op->name, record.op->signature, first, Py_ssize_t{8} * record.op->slots);
    if (row == nullptr || PyList_Append(list, row) != 0) {
      Py_XDECREF(row);
      Py_DECREF(list);
      return nullptr;
    }
    Py_DECREF(row);
  }
  return list;
}

// set_slots(graph, places, value): writes an integer argument into slots; `places` are int32, counted over all calls.
PyObject* set_slots(PyObject*, PyObject* args) {
  PyObject* capsule;
  const char* places;
  Py_ssize_t bytes;
  long long value;
  if (!PyArg_ParseTuple(args, "Oy#L", &capsule, &places, &bytes, &value)) return nullptr;
  phl::Graph* graph = graph_of(capsule);
  if (graph == nullptr) return nullptr;
  for (Py_ssize_t at = 0; at + 4 <= bytes; at += 4) {
    int32_t place;
    std::memcpy(&place, places + at, 4);
    if (place < 0 || static_cast<size_t>(place) >= graph->slots.size()) {
      PyErr_SetString(PyExc_IndexError, "no such slot");
      return nullptr;
    }
    graph->slots[place] = static_cast<uint64_t>(value);
  }
  Py_RETURN_NONE;
}

// replay_timed(graph) -> [(op name, solo, nanoseconds)]
PyObject* replay_timed(PyObject*, PyObject* capsule) {
  phl::Graph* graph = graph_of(capsule);
  if (graph == nullptr) return nullptr;
  std::vector<int64_t> times(graph->records.size() + 1);
  Py_BEGIN_ALLOW_THREADS
  graph->replay_timed(times.data());
  Py_END_ALLOW_THREADS
  PyObject* list = PyList_New(0);
  for (size_t i = 0; list != nullptr && i < graph->records.size(); ++i) {
    const phl::Record& record = graph->records[i];
    PyObject* row = Py_BuildValue("(siL)", record.op->name, int(record.solo), static_cast<long long>(times[i]));
    if (row == nullptr || PyList_Append(list, row) != 0) {
      Py_XDECREF(row);
      Py_DECREF(list);
      return nullptr;
    }
    Py_DECREF(row);
  }
  return list;
}

PyMethodDef methods[] = {
    {"call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)(void)>(call)), METH_FASTCALL,
     "call(handle, work, *arguments): run an op, and record it if this thread records"},
    {"op", op, METH_O, "op(name) -> handle of the best unit at the current level"},
    {"ops", ops, METH_NOARGS, "every registered op: (name, level, signature)"},
    {"levels", levels, METH_NOARGS, "instruction-set levels that this CPU can run"},
    {"set_level", set_level, METH_O, "use no level above this one in later op() calls; None: the best"},
    {"level", level, METH_NOARGS, "the level in use"},
    {"worker_ids", worker_ids, METH_NOARGS, "thread ids of the pool's workers, for binding them to cores"},
    {"set_threads", set_threads, METH_O, "size of the thread pool, the caller included"},
    {"threads", threads, METH_NOARGS, "size of the thread pool"},
    {"record_begin", record_begin, METH_O, "append this thread's calls to a new graph; False: without running them"},
    {"record_end", record_end, METH_NOARGS, "the graph recorded since record_begin, or None"},
    {"calls", calls, METH_O, "a graph's calls: (op name, signature, slots)"},
    {"set_slots", set_slots, METH_VARARGS, "write an integer into slots of a graph's calls: (graph, int32 places, value)"},
    {"replay", replay, METH_O, "run a graph in one parallel region"},
    {"replay_timed", replay_timed, METH_O, "run a graph and time each op: (name, solo, nanoseconds)"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cpu", "Native CPU kernels", -1, methods,
                          nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu(void) { return PyModule_Create(&definition); }
