"""The edge cases of the kernels in kernels.def.

An edge is a usual shape that is special in one respect. ``most`` and ``unit`` belong to the kernel: the most
rows or columns that it computes at once, and the multiple of k or of columns in which it works.
"""

FLOATS = ("float32", "bfloat16", "float64")
WIDENED = (*FLOATS, "float16")
ROWS_OF_A = ("m=1", "m=most-1", "m=most")
K = ("k=1", "k=3", "k=unit-1", "k=unit", "k=unit+1")
COLUMNS = ("columns=1", "columns=15", "columns=16")
MORE_COLUMNS = (*COLUMNS, "columns=17", "columns=most")
STRIDE = ("stride=0", "stride=7")
ADDS = ("adds=0", "adds=1")
ROWS_OF_W = ("columns=1", "columns=3", "columns=4", "columns=5", "columns=130")
GROUPS = ("group=32", "group=64", "group=96", "group=128", "group=4096")

EDGES = {
    "transpose_16x16": (("bytes",), STRIDE),
    "transpose_block": (("float32", "bfloat16", "float16"), STRIDE),
    "pack_nt": (WIDENED, (*COLUMNS, *K, *STRIDE)),
    "pack_nt_scaled": (WIDENED, (*COLUMNS, *K, *STRIDE)),
    "pack_nn": (WIDENED, (*MORE_COLUMNS, *K, *STRIDE, "column=3")),
    "pack_nn_scaled": (WIDENED, (*COLUMNS, *K, *STRIDE)),
    "pack_columns": (FLOATS, (*COLUMNS, *K, *STRIDE)),
    "pack_rows": (FLOATS, (*COLUMNS, "k=unit", *STRIDE)),
    "zero_past_caches": (
        ("bytes",),
        ("columns=1", "columns=13", "columns=28", "columns=29", "columns=4096", "first=1", "first=16"),
    ),
    "stage_rows": (WIDENED, (*ROWS_OF_A, *K, *STRIDE)),
    "point_into_panels": (FLOATS, (*ROWS_OF_A, "first=13")),
    "micro_gemm": (FLOATS, (*ROWS_OF_A, "m=half", "m=half+1", *K, *STRIDE, *ADDS, "a=panels")),
    "direct_dots": (
        WIDENED,
        (*ROWS_OF_A, "m=most+1", "m=32", *K, "k=600", *ROWS_OF_W, *STRIDE),
    ),
    "direct_columns": (
        WIDENED,
        (*ROWS_OF_A, "m=most+1", "m=32", *K, *COLUMNS, "columns=17", "columns=unit-1", "columns=unit",
         "columns=unit+1", *STRIDE, *ADDS),
    ),
    "micro_dots": (
        ("bytes",),
        (*ROWS_OF_A, "blocks=1", "blocks=3", "blocks=4", "blocks=5", "group=16", "group=32", "group=64",
         "group=4096", "pairs=1", "joins=1", "begins=0", "mins=0", "code=15", "code=31", "code=63",
         "code=127", *STRIDE, *ADDS),
    ),
    "band": (("bfloat16",), ("k=unit", "k=640", *STRIDE, *ADDS)),
    "put_band": (("bfloat16",), (*COLUMNS, "panels=1", *STRIDE)),
    "ahead": (
        ("bfloat16",),
        (*ROWS_OF_A, "m=half", "k=unit", "k=640", "columns=unit", "columns=64", "columns=96", "columns=most",
         *STRIDE, *ADDS),
    ),
    "stage_tiles": (("bfloat16",), (*ROWS_OF_A, "m=15", "m=16", "m=17", *K, *STRIDE)),
    "stage_panels": (("bfloat16",), (*ROWS_OF_A, "m=15", "m=16", "m=17", *K, "first=32")),
    "tile_dots": (
        ("bytes",),
        (*ROWS_OF_A, "m=15", "m=16", "m=17", *MORE_COLUMNS, "columns=31", "steps=1", "steps=2", *STRIDE),
    ),
    "format_rows": (
        ("float32", "bfloat16"),
        (*K, "k=9000", "first=3", "first=31", "first=32", *GROUPS, *STRIDE),
    ),
    "format_dots": (("bytes",), (*ROWS_OF_A, *ROWS_OF_W, *K, *GROUPS, *STRIDE)),
    "code_dots": (("bytes",), (*ROWS_OF_A, *ROWS_OF_W, *K, *GROUPS, *STRIDE)),
    "code_rows": (("bytes",), ("columns=1", *K, *STRIDE)),
    "code_panel": (("bytes",), (*COLUMNS, *K, "ahead=64")),
    "code_scales": (("bytes",), (*COLUMNS, *K, "k=1000", *GROUPS, *STRIDE)),
}  # fmt: skip
"""Maps each suite to (dtypes, edges)."""
