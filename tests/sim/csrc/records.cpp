// What the device was asked to do: counted always, told to a listener where a test wants to know from where.
#include "sim.h"

#include <mutex>
#include <set>

namespace sim::records {
namespace {
std::mutex guard;
Counts seen;
std::set<std::string> unlowered;
Listener listener;

void tell(const std::string& what, const std::string& name) {
  Listener now;
  {
    std::lock_guard<std::mutex> held(guard);
    now = listener;
  }
  if (now) now(what, name);  // outside the lock: it takes the interpreter's
}
}  // namespace

void set_unlowered(std::vector<std::string> names) {
  std::lock_guard<std::mutex> held(guard);
  unlowered = {names.begin(), names.end()};
}

void set_listener(Listener made) {
  std::lock_guard<std::mutex> held(guard);
  listener = std::move(made);
}

void note_operator(const std::string& name, bool float64) {
  bool fallback = false;
  {
    std::lock_guard<std::mutex> held(guard);
    ++seen.operators[name];
    if (float64) ++seen.float64[name];
    fallback = unlowered.count(name) > 0;
    if (fallback) ++seen.fallbacks[name];
  }
  if (fallback) tell("fallback", name);
}

void note_transfer(const std::string& what, const std::string& name) {
  {
    std::lock_guard<std::mutex> held(guard);
    ++seen.transfers[what];
  }
  if (what != "to device") tell(what, name);
}

void note_collective(Collective collective) {
  std::lock_guard<std::mutex> held(guard);
  seen.collectives.push_back(std::move(collective));
}

Counts counts() {
  std::lock_guard<std::mutex> held(guard);
  return seen;
}

void reset() {
  std::lock_guard<std::mutex> held(guard);
  seen = {};
}

}  // namespace sim::records
