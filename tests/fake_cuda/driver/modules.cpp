// Modules: a cubin is an ELF file, and says what a launch of each of its kernels has to be.
#include <fstream>
#include <sstream>

#include "state.hpp"

namespace {

// A cubin's kernel is a section ".text.NAME"; ".nv.info.NAME" has its attributes: a format, a number, and a value of 16
// bits, or so many bytes more where the format is 4.
enum Attribute { kMaxThreads = 0x05, kArgument = 0x17, kCluster = 0x3d };

constexpr const char* kText = ".text.";
constexpr const char* kInfo = ".nv.info.";
constexpr const char* kShared = ".nv.shared.";

std::set<std::unique_ptr<Module>> modules;
std::set<Kernel*> kernels;

class Elf {
 public:
  explicit Elf(std::string image) : image_(std::move(image)) {}

  template <class T>
  T at(std::size_t offset) const {
    T value{};
    if (offset + sizeof(T) <= image_.size()) memcpy(&value, image_.data() + offset, sizeof(T));
    return value;
  }

  unsigned arch() const {
    const auto flags = at<std::uint32_t>(48);
    return image_[8] >= 8 ? flags >> 8 & 0xff : flags & 0xff;  // by the version of the ABI
  }

  unsigned sections() const { return at<std::uint16_t>(60); }
  std::size_t offset(unsigned section) const { return at<std::uint64_t>(header(section) + 24); }
  std::size_t size(unsigned section) const { return at<std::uint64_t>(header(section) + 32); }

  std::string name(unsigned section) const {
    return image_.c_str() + offset(at<std::uint16_t>(62)) + at<std::uint32_t>(header(section));
  }

 private:
  std::size_t header(unsigned section) const { return at<std::uint64_t>(40) + 64ull * section; }

  std::string image_;
};

bool starts(const std::string& text, const std::string& with) { return text.compare(0, with.size(), with) == 0; }

void read_attributes(const Elf& elf, unsigned section, Kernel& kernel) {
  auto product = [&](std::size_t o) {
    return elf.at<std::uint32_t>(o) * elf.at<std::uint32_t>(o + 4) * elf.at<std::uint32_t>(o + 8);
  };
  const std::size_t end = elf.offset(section) + elf.size(section);
  for (std::size_t o = elf.offset(section); o + 4 <= end;) {
    const auto format = elf.at<std::uint8_t>(o), which = elf.at<std::uint8_t>(o + 1);
    const auto value = elf.at<std::uint16_t>(o + 2);
    o += 4;
    if (which == kMaxThreads) kernel.max_threads = product(o);
    if (which == kCluster) kernel.cluster = product(o);
    if (which == kArgument) {
      const auto ordinal = elf.at<std::uint16_t>(o + 4);
      if (kernel.arguments.size() <= ordinal) kernel.arguments.resize(ordinal + 1);
      kernel.arguments[ordinal] = elf.at<std::uint32_t>(o + 8) >> 18;
    }
    if (format == 4) o += value;
  }
}

Status read_cubin(Module& module, std::string image) {
  Elf elf(std::move(image));
  module.arch = elf.arch();
  // [guide] Binary Compatibility "a cubin object generated for compute capability X.y will only execute on devices of
  // compute capability X.z where z≥y." [driver] CUDA_ERROR_NO_BINARY_FOR_GPU "there is no kernel image available that
  // is suitable for the device."
  const unsigned have = settings.major * 10 + settings.minor;
  if (module.arch / 10 != have / 10 || module.arch > have)
    return refuse(kNoBinaryForGpu, "a cubin of another architecture");
  for (unsigned i = 0; i < elf.sections(); i++) {
    const std::string name = elf.name(i);
    if (!starts(name, kText)) continue;
    auto& kernel = module.kernels[name.substr(strlen(kText))] = std::make_unique<Kernel>();
    kernel->module = &module;
    kernel->name = name.substr(strlen(kText));
  }
  // As of Hopper a section of shared memory begins with what the system keeps for itself, of which no attribute tells.
  const unsigned reserved = module.arch >= 90 ? 1024 : 0;
  for (unsigned i = 0; i < elf.sections(); i++) {
    const std::string name = elf.name(i);
    for (auto& [entry, kernel] : module.kernels) {
      if (name == kInfo + entry) read_attributes(elf, i, *kernel);
      if (name == kShared + entry) kernel->static_shared = elf.size(i) - reserved;
    }
  }
  // [driver] CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES "The default value of this attribute is
  // CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK - CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, except when
  // CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES is greater than CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK, then the
  // default value of this attribute is 0."
  for (auto& [entry, kernel] : module.kernels)
    kernel->dynamic_shared = std::max(0, 48 * 1024 - static_cast<int>(kernel->static_shared));
  return kSuccess;
}

// What takes the place of CuPy's own kernels, which NumPy runs: "kernel on the host N", the name, the arguments' bytes.
constexpr const char* kHostKernel = "kernel on the host ";

Status read_host_kernel(Module& module, const char* image) {
  std::istringstream text(image);
  std::getline(text, module.path);
  auto kernel = std::make_unique<Kernel>();
  kernel->module = &module;
  text >> kernel->name;
  for (unsigned bytes; text >> bytes;) kernel->arguments.push_back(bytes);
  module.kernels[kernel->name] = std::move(kernel);
  return kSuccess;
}

Status load(Module** result, const char* image, std::size_t bytes, const char* path) {
  if (settings.failing_load && !--settings.failing_load) return refuse(kOutOfMemory, "a module is not loaded");
  auto module = std::make_unique<Module>();
  module->path = path;
  module->context = current();
  if (!strncmp(image, kHostKernel, strlen(kHostKernel))) {
    REQUIRE(read_host_kernel(*module, image));
  } else if (!memcmp(image, "\x7f" "ELF", 4)) {
    REQUIRE(read_cubin(*module, std::string(image, bytes)));
  } else {
    return refuse(kInvalidImage, "a module that is not a cubin");
  }
  Lock lock(tables);
  for (auto& [name, kernel] : module->kernels) kernels.insert(kernel.get());
  note("load arch=%u kernels=%zu %s", module->arch, module->kernels.size(), path);
  *result = module.get();
  modules.insert(std::move(module));
  return kSuccess;
}

}  // namespace

bool is_kernel(Kernel* kernel) {
  Lock lock(tables);
  return kernels.count(kernel);
}

// No manual says whether a module may be loaded beside a capture. Loading allocates and copies, and drivers have
// refused it as one of the "potentially unsafe API calls" of cuThreadExchangeStreamCaptureMode.
API int cuModuleLoadData(Module** module, const void* image) {
  REQUIRE(in_context());
  REQUIRE(unsafe("cuModuleLoadData"));
  const char* bytes = static_cast<const char*>(image);
  std::uint64_t end = 0;
  if (!memcmp(bytes, "\x7f" "ELF", 4)) {  // its section headers are its end, or its program headers
    std::uint64_t sections, programs;
    std::uint16_t section_count, program_count;
    memcpy(&programs, bytes + 32, 8);
    memcpy(&sections, bytes + 40, 8);
    memcpy(&program_count, bytes + 56, 2);
    memcpy(&section_count, bytes + 60, 2);
    end = std::max(sections + 64ull * section_count, programs + 56ull * program_count);
  }
  return load(module, bytes, end, "");
}

API int cuModuleLoad(Module** module, const char* path) {
  REQUIRE(in_context());
  REQUIRE(unsafe("cuModuleLoad"));
  std::ifstream file(path, std::ios::binary);
  if (!file) return refuse(kFileNotFound, path);
  const std::string image(std::istreambuf_iterator<char>(file), {});
  return load(module, image.data(), image.size(), path);
}

API int cuModuleUnload(Module* module) {
  Lock lock(tables);
  for (auto& [name, kernel] : module->kernels) kernels.erase(kernel.get());
  note("unload %s", module->path.c_str());
  return kSuccess;  // what is in a queue may still name it: it stays
}

API int cuModuleGetFunction(Kernel** kernel, Module* module, const char* name) {
  REQUIRE(in_context());
  auto found = module->kernels.find(name);
  if (found == module->kernels.end()) return refuse(kNotFound, name);
  *kernel = found->second.get();
  return kSuccess;
}

API int cuModuleGetGlobal_v2(Address*, std::size_t*, Module*, const char* name) { return refuse(kNotFound, name); }

API int cuFuncGetAttribute(int* value, int which, Kernel* kernel) {
  REQUIRE(ready());
  if (!is_kernel(kernel)) return refuse(kInvalidHandle, "cuFuncGetAttribute");
  switch (which) {
    case 0: *value = kernel->max_threads; break;
    case 1: *value = kernel->static_shared; break;
    case 5: case 6: *value = kernel->module->arch; break;
    case 8: *value = kernel->dynamic_shared; break;
    default: *value = 0;
  }
  return kSuccess;
}

API int cuFuncSetAttribute(Kernel* kernel, int which, int value) {
  REQUIRE(in_context());
  if (!is_kernel(kernel)) return refuse(kInvalidHandle, "cuFuncSetAttribute");
  note("attribute %d=%d of %s", which, value, kernel->name.c_str());
  if (which != 8) return kSuccess;
  // [driver] cuFuncSetAttribute "The sum of this value and the function attribute
  // CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES cannot exceed the device attribute
  // CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN."
  if (value < 0 || value + static_cast<int>(kernel->static_shared) > settings.shared_optin)
    return refuse(kInvalidValue, "more dynamic shared memory than a block can have");
  kernel->dynamic_shared = value;
  return kSuccess;
}

API int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, std::size_t) {
  *blocks = 1;
  return kSuccess;
}

API int cuOccupancyMaxPotentialBlockSize(int* grid, int* block, Kernel* kernel, void*, std::size_t, int) {
  *grid = settings.multiprocessors;
  *block = kernel->max_threads;
  return kSuccess;
}
