// The Python module `_cpu` (stable ABI): ops by handle, step graphs, threads. Arguments come by name and are packed into
// 8-byte slots.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <cstring>
#include <string>
#include <vector>

#include "graph.h"
#include "op.h"

namespace phl {
extern const char* const kBuiltFrom;  // written by setup.py
}

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

// Where the arguments of one place in the source go. Python hands over the same tuple of names at every call from there.
struct Site {
  PyObject* names;
  int8_t slot_of[phl::kMaxSlots];
};
constexpr size_t kMaxSites = 32;  // of an op that are remembered

std::vector<Site>& sites_of(long handle) {
  static auto* sites = new std::vector<std::vector<Site>>(static_cast<size_t>(phl::op_count()));
  return (*sites)[static_cast<size_t>(handle)];
}

int slot_named(const phl::OpEntry& op, PyObject* name) {
  for (int slot = 0; slot < op.slots; ++slot) {
    PyObject* field = PyUnicode_FromString(op.fields[slot].name);
    const bool same = field != nullptr && PyUnicode_Compare(field, name) == 0;
    Py_XDECREF(field);
    if (same) return slot;
  }
  return -1;
}

// Finds the slot of each name. As many different names as there are slots: every slot has one.
bool resolve(const phl::OpEntry& op, PyObject* names, Site* site) {
  const Py_ssize_t count = names == nullptr ? 0 : PyTuple_Size(names);
  if (count != op.slots) {
    PyErr_Format(PyExc_TypeError, "%s takes %d arguments by name, not %zd", op.name, op.slots, count);
    return false;
  }
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* name = PyTuple_GetItem(names, i);
    const int slot = slot_named(op, name);
    if (slot < 0) {
      if (PyErr_Occurred() == nullptr) PyErr_Format(PyExc_TypeError, "%s has no argument %R", op.name, name);
      return false;
    }
    site->slot_of[i] = static_cast<int8_t>(slot);
  }
  site->names = names;
  return true;
}

bool pack(const phl::OpEntry& op, long handle, PyObject* const* values, PyObject* names, uint64_t* slots) {
  std::vector<Site>& sites = sites_of(handle);
  const Site* site = nullptr;
  for (const Site& known : sites) {
    if (known.names == names) site = &known;
  }
  Site found;
  if (site == nullptr) {
    if (!resolve(op, names, &found)) return false;
    site = &found;
    if (sites.size() < kMaxSites) {
      Py_INCREF(names);  // so that no other tuple comes to stand at its address
      sites.push_back(found);
    }
  }
  for (int i = 0; i < op.slots; ++i) {
    const int slot = site->slot_of[i];
    if (!pack_slot(op.fields[slot].kind, values[i], slots + slot)) return false;
  }
  return true;
}

// The op of a handle, its arguments packed; nullptr: an error is set.
const phl::OpEntry* prepare(PyObject* number, PyObject* const* values, PyObject* names, uint64_t* slots) {
  const long handle = PyLong_AsLong(number);
  if (PyErr_Occurred()) return nullptr;
  if (handle < 0 || handle >= phl::op_count()) {
    PyErr_SetString(PyExc_IndexError, "no such op");
    return nullptr;
  }
  const phl::OpEntry& op = phl::op_at(static_cast<int>(handle));
  return pack(op, handle, values, names, slots) ? &op : nullptr;
}

// ask(handle, **arguments)
PyObject* ask(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* names) {
  if (count != 1) {
    PyErr_SetString(PyExc_TypeError, "ask(handle, **arguments): an op takes its arguments by name");
    return nullptr;
  }
  uint64_t slots[phl::kMaxSlots];
  const phl::OpEntry* op = prepare(args[0], args + 1, names, slots);
  if (op == nullptr) return nullptr;
  phl::Team alone;
  op->run(slots, alone);
  Py_RETURN_NONE;
}

// call(handle, work, **arguments)
PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* names) {
  if (count != 2) {
    PyErr_SetString(PyExc_TypeError, "call(handle, work, **arguments): an op takes its arguments by name");
    return nullptr;
  }
  const long long work = PyLong_AsLongLong(args[1]);
  if (PyErr_Occurred()) return nullptr;
  uint64_t slots[phl::kMaxSlots];
  const phl::OpEntry* found = prepare(args[0], args + 2, names, slots);
  if (found == nullptr) return nullptr;
  const phl::OpEntry& op = *found;
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

// Appends to a list and gives up the reference; false: an error is set.
bool append(PyObject* list, PyObject* item) {
  const bool good = item != nullptr && PyList_Append(list, item) == 0;
  Py_XDECREF(item);
  return good;
}

// [make(i) for i in range(count)]
template <class F>
PyObject* list_of(int count, F&& make) {
  PyObject* list = PyList_New(0);
  for (int i = 0; list != nullptr && i < count; ++i) {
    if (append(list, make(i))) continue;
    Py_DECREF(list);
    return nullptr;
  }
  return list;
}

std::string kinds_of(const phl::OpEntry& op) {
  std::string kinds;
  for (int slot = 0; slot < op.slots; ++slot) kinds += op.fields[slot].kind;
  return kinds;
}

PyObject* ops(PyObject*, PyObject*) {
  return list_of(phl::op_count(), [](int i) -> PyObject* {
    const phl::OpEntry& op = phl::op_at(i);
    PyObject* fields = list_of(op.slots, [&](int slot) { return PyUnicode_FromString(op.fields[slot].name); });
    if (fields == nullptr) return nullptr;
    return Py_BuildValue("(sssN)", op.name, phl::kLevelNames[op.level], kinds_of(op).c_str(), fields);
  });
}

PyObject* constants(PyObject*, PyObject*) {
  return list_of(phl::constant_count(), [](int i) {
    const phl::ConstantEntry& constant = phl::constant_at(i);
    return Py_BuildValue("(ssL)", constant.name, phl::kLevelNames[constant.level], static_cast<long long>(constant.value));
  });
}

PyObject* built_from(PyObject*, PyObject*) { return PyUnicode_FromString(phl::kBuiltFrom); }

PyObject* levels(PyObject*, PyObject*) {
  std::vector<int> found;
  for (int i = 0; i <= phl::best_level(); ++i) {
    if (phl::runs(i)) found.push_back(i);
  }
  PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(found.size()));
  for (size_t i = 0; tuple != nullptr && i < found.size(); ++i) {
    PyTuple_SetItem(tuple, static_cast<Py_ssize_t>(i), PyUnicode_FromString(phl::kLevelNames[found[i]]));
  }
  return tuple;
}

PyObject* set_level(PyObject*, PyObject* name) {
  if (name == Py_None) {
    level_limit = -1;
    Py_RETURN_NONE;
  }
  for (int i = 0; i <= phl::best_level(); ++i) {
    if (!phl::runs(i)) continue;
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

// calls(graph) -> [(op name, kinds of its slots, arguments as the bytes of 8-byte slots)]
PyObject* calls(PyObject*, PyObject* capsule) {
  const phl::Graph* graph = graph_of(capsule);
  if (graph == nullptr) return nullptr;
  return list_of(static_cast<int>(graph->records.size()), [&](int i) {
    const phl::Record& record = graph->records[static_cast<size_t>(i)];
    const auto* first = reinterpret_cast<const char*>(graph->slots.data() + record.first_slot);
    const Py_ssize_t bytes = Py_ssize_t{8} * record.op->slots;
    return Py_BuildValue("(ssy#)", record.op->name, kinds_of(*record.op).c_str(), first, bytes);
  });
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
  return list_of(static_cast<int>(graph->records.size()), [&](int i) {
    const phl::Record& record = graph->records[static_cast<size_t>(i)];
    return Py_BuildValue("(siL)", record.op->name, int(record.solo), static_cast<long long>(times[static_cast<size_t>(i)]));
  });
}

PyMethodDef methods[] = {
    {"call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)(void)>(call)), METH_FASTCALL | METH_KEYWORDS,
     "call(handle, work, **arguments): run an op, and record it if this thread records"},
    {"ask", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)(void)>(ask)), METH_FASTCALL | METH_KEYWORDS,
     "ask(handle, **arguments): run an op that tells something, on this thread; never recorded"},
    {"op", op, METH_O, "op(name) -> handle of the best unit at the current level"},
    {"ops", ops, METH_NOARGS, "every registered op: (name, level, kinds of its arguments, their names)"},
    {"constants", constants, METH_NOARGS, "what the units export: (name, level, value)"},
    {"built_from", built_from, METH_NOARGS, "digest of the sources that the library was built from"},
    {"levels", levels, METH_NOARGS, "instruction-set levels that this CPU can run"},
    {"set_level", set_level, METH_O, "use no level above this one in later op() calls; None: the best"},
    {"level", level, METH_NOARGS, "the level in use"},
    {"worker_ids", worker_ids, METH_NOARGS, "thread ids of the pool's workers, for binding them to cores"},
    {"set_threads", set_threads, METH_O, "size of the thread pool, the caller included"},
    {"threads", threads, METH_NOARGS, "size of the thread pool"},
    {"record_begin", record_begin, METH_O, "append this thread's calls to a new graph; False: without running them"},
    {"record_end", record_end, METH_NOARGS, "the graph recorded since record_begin, or None"},
    {"calls", calls, METH_O, "a graph's calls: (op name, kinds, slots)"},
    {"set_slots", set_slots, METH_VARARGS, "write an integer into slots of a graph's calls: (graph, int32 places, value)"},
    {"replay", replay, METH_O, "run a graph in one parallel region"},
    {"replay_timed", replay_timed, METH_O, "run a graph and time each op: (name, solo, nanoseconds)"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cpu", "Native CPU kernels", -1, methods,
                          nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu(void) { return PyModule_Create(&definition); }
