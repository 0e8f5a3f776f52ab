// The torch this binary was built for, as text inside the binary itself: when the extension cannot
// be loaded, fuse_ext/kernels/require.py reads it from the file to say why.

namespace fuse_ext {

extern const char kBuiltFor[];
[[gnu::used]] const char kBuiltFor[] = "fuse_ext was built for torch " FUSE_EXT_TORCH_VERSION;

}  // namespace fuse_ext
