"""How eigenvalues are computed: LAPACK, the band reduction, and the engines made of them."""

ROW_CHUNK = 512  # rows of a matrix upcast at a time: 16 MiB of float64 at 4096 columns
