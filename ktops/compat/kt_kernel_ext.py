"""The names of KTransformers' extension module ``kt_kernel_ext``."""
