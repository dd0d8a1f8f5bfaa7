"""How eigenvalues are computed: LAPACK, the band reduction, and the engines made of them."""
