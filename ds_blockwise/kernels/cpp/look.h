// SPDX-License-Identifier: Apache-2.0
// Whether tensors are as they were: what Python would ask of each in a dozen calls, read and compared in one.
//
// The library needs no header of Python or torch and fits every version of both: look.py finds the functions of their
// stable C interfaces, and where a Python object keeps its tensor, and compares what is read here with what Python says.
#pragma once

#include <cstdint>
#include <vector>

namespace blockwise {

using Object = void*;  // of Python, borrowed
using Handle = void*;  // of torch's C interface: where an object keeps its at::Tensor

// Written by look.py; the order of fields is the interface. Functions of torch return 0 if there was no error.
struct LookTable {
  int32_t (*layout)(Handle, int32_t*);
  int32_t (*dtype)(Handle, int32_t*);
  int32_t (*device_type)(Handle, int32_t*);
  int32_t (*device_index)(Handle, int32_t*);
  int32_t (*dim)(Handle, int64_t*);
  int32_t (*data_ptr)(Handle, void**);
  int32_t (*storage_size)(Handle, int64_t*);
  int32_t (*storage_offset)(Handle, int64_t*);
  int32_t (*sizes)(Handle, int64_t**);
  int32_t (*strides)(Handle, int64_t**);
  bool (*is_neg)(Handle);
  int64_t (*list_size)(Object);
  Object (*list_item)(Object, int64_t);
  Object (*dict_item)(Object, Object);  // null: it has no such key, or is no dict
  int32_t (*is_subtype)(Object, Object);
  Object (*new_bytes)(const char*, int64_t);
  int64_t (*bytes_size)(Object);
  char* (*bytes_data)(Object);
  void (*keep)(Object);
  void (*forget_error)();
  Object tensor_type, parameter_type, exp_avg, exp_avg_sq, yes, no, none;
  int64_t type_at, tensor_at, storage_at;  // bytes from the beginning of an object, and of what its tensor points to
};

inline LookTable look_table{};

// The tensors of one look, and then their facts, one by one.
class Look {
 public:
  explicit Look(const LookTable& table) : t_(table) {}

  // lists: of tensors that stay, of states, and of gradients, which may be others that lie elsewhere. Whether they are.
  bool take(const Object* lists) {
    const int64_t tensors = t_.list_size(lists[0]), states = t_.list_size(lists[1]), grads = t_.list_size(lists[2]);
    if (tensors < 0 || states < 0 || grads < 0) return false;
    staying_ = tensors + 2 * states;
    found_.reserve(staying_ + grads);
    for (int64_t i = 0; i < tensors; ++i) found_.push_back(t_.list_item(lists[0], i));
    for (int64_t i = 0; i < states; ++i)
      for (const Object key : {t_.exp_avg, t_.exp_avg_sq})
        found_.push_back(t_.dict_item(t_.list_item(lists[1], i), key));
    for (int64_t i = 0; i < grads; ++i) found_.push_back(t_.list_item(lists[2], i));
    return true;
  }

  // `fact` takes one and says whether to go on. Whether all were taken.
  template <class Fact>
  bool read(Fact&& fact) {
    ask_for_all();
    const int64_t n = int64_t(found_.size());
    if (!fact(staying_) || !fact(n)) return false;
    for (int64_t i = 0; i < n; ++i)
      if (!(found_[i] ? facts_of(found_[i], i < staying_, fact) : fact(0))) return false;
    return true;
  }

 private:
  // A step has pushed all of it out of the near caches.
  void ask_for_all() {
    for (const Object object : found_) __builtin_prefetch(object);
    const auto each_tensor = [this](auto&& f) {
      for (const Object object : found_)
        if (object && is_plain(type_of(object))) f(*reinterpret_cast<const char**>(handle_of(object)));
    };
    each_tensor([](const char* tensor) {
      for (int line = 0; line < 4; ++line) __builtin_prefetch(tensor + 64 * line);
    });
    each_tensor([this](const char* tensor) {
      const char* storage = *reinterpret_cast<const char* const*>(tensor + t_.storage_at);
      for (int line = 0; line < 2; ++line) __builtin_prefetch(storage + 64 * line);
    });
  }

  template <class Fact>
  bool facts_of(Object object, bool stays, Fact&& fact) {
    const Object type = type_of(object);
    if (!is_plain(type) && !t_.is_subtype(type, t_.tensor_type)) return false;
    if (!fact(reinterpret_cast<int64_t>(type))) return false;
    const Handle tensor = handle_of(object);
    int32_t layout, dtype, device, index;
    int64_t dim, bytes, offset, *sizes, *strides;
    void* address;
    if (t_.layout(tensor, &layout) || t_.dtype(tensor, &dtype) || t_.device_type(tensor, &device) ||
        t_.device_index(tensor, &index) || t_.dim(tensor, &dim))
      return false;
    if (!fact(int64_t(layout) << 32 | dtype) || !fact(int64_t(device) << 32 | uint32_t(index)) ||
        !fact(dim << 1 | int64_t(t_.is_neg(tensor))))
      return false;
    // asked for last: tensors of another layout have none of it
    if (t_.data_ptr(tensor, &address) || t_.storage_size(tensor, &bytes) || t_.storage_offset(tensor, &offset) ||
        t_.sizes(tensor, &sizes) || t_.strides(tensor, &strides))
      return false;
    if (!fact(stays ? reinterpret_cast<int64_t>(address) : address != nullptr) || !fact(bytes) || !fact(offset)) return false;
    for (int64_t d = 0; d < dim; ++d)
      if (!fact(sizes[d]) || !fact(strides[d])) return false;
    return true;
  }

  bool is_plain(Object type) const { return type == t_.tensor_type || type == t_.parameter_type; }
  Object type_of(Object object) const { return *reinterpret_cast<Object*>(static_cast<char*>(object) + t_.type_at); }
  Handle handle_of(Object object) const { return static_cast<char*>(object) + t_.tensor_at; }

  const LookTable& t_;
  std::vector<Object> found_;
  int64_t staying_ = 0;
};

inline Object answer(const LookTable& table, Object object) {
  table.forget_error();
  table.keep(object);
  return object;
}

}  // namespace blockwise

extern "C" {

// Both functions below are called by Python as they are, the interpreter locked; this comes before.
void ds_blockwise_set_look_table(const blockwise::LookTable* table) { blockwise::look_table = *table; }

// arguments: lists as of `Look::at`. Returns the facts as bytes; None if something is no tensor, or has no memory.
void* ds_blockwise_facts(void*, void* const* arguments, int64_t count) {
  const blockwise::LookTable& table = blockwise::look_table;
  std::vector<int64_t> facts;
  const auto keep = [&](int64_t fact) {
    facts.push_back(fact);
    return true;
  };
  blockwise::Look look(table);
  if (count != 3 || !look.take(arguments) || !look.read(keep)) return blockwise::answer(table, table.none);
  return table.new_bytes(reinterpret_cast<const char*>(facts.data()), 8 * int64_t(facts.size()));
}

// arguments: facts, and the lists. Returns whether their facts are these.
void* ds_blockwise_facts_hold(void*, void* const* arguments, int64_t count) {
  const blockwise::LookTable& table = blockwise::look_table;
  if (count != 4) return blockwise::answer(table, table.no);
  const auto* seen = reinterpret_cast<const int64_t*>(table.bytes_data(arguments[0]));
  const int64_t* end = seen ? seen + table.bytes_size(arguments[0]) / 8 : nullptr;
  const auto compare = [&](int64_t fact) { return seen < end && *seen++ == fact; };
  blockwise::Look look(table);
  const bool hold = look.take(arguments + 1) && look.read(compare) && seen == end;
  return blockwise::answer(table, hold ? table.yes : table.no);
}

}  // extern "C"
