"""The few BLAS and LAPACK routines that torch does not expose, bound through ctypes.

They come from the public package ``scipy-openblas64`` (OpenBLAS with 64-bit integers; names like
``scipy_dsytrd_sb2st_64_``). It is a copy of our own: numpy, scipy and torch each use another, so
that holding it to one thread, for good, at load, changes nothing for them. ctypes releases the GIL
during a call, and OpenBLAS at one thread is reentrant, so that threads run these side by side.

All matrices are Fortran-ordered (column-major) numpy arrays of float32 or float64, and are
overwritten where LAPACK does so. Nothing is copied.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
from pathlib import Path
from typing import Any, cast

import numpy as np

LETTERS = {np.dtype(np.float32): "s", np.dtype(np.float64): "d"}
C_FLOATS = {"s": ctypes.c_float, "d": ctypes.c_double}
NEEDED = ("syrk", "symm", "syr2k", "gemm", "trmm", "geqrt", "sytrd", "sytrd_sb2st", "sterf")
BLOCK = 256  # columns of a symmetric matrix that are multiplied at once


class LapackError(RuntimeError):
    """A routine returned info != 0."""


class Lapack:
    """The loaded library.

    Args:
        path: of the shared library.

    Attributes:
        name: what to tell the user, such as ``OpenBLAS 0.3.34 (SkylakeX)``.

    Raises:
        OSError: the library cannot be loaded.
        AttributeError: it lacks a routine.
    """

    def __init__(self, path: Path) -> None:
        # RTLD_LOCAL (the default): numpy's bundled copy has the same symbol names. `import
        # scipy_openblas64` would load it RTLD_GLOBAL and bind parts of numpy to it.
        self._library = ctypes.CDLL(str(path))
        words = self._text("scipy_openblas_get_config64_").split()
        self.name = f"{words[0]} {words[1]} ({self._text('scipy_openblas_get_corename64_')})"
        for letter, routine in itertools.product("sd", NEEDED):
            self._function(letter + routine)
        set_threads = self._library.scipy_openblas_set_num_threads64_
        set_threads.argtypes = [ctypes.c_int]
        set_threads(1)

    def _text(self, name: str) -> str:
        function = getattr(self._library, name)
        function.restype = ctypes.c_char_p
        return function().decode()

    def _function(self, name: str) -> Any:
        function = getattr(self._library, f"scipy_{name}_64_")
        function.restype = None
        return function

    def _call(self, name: str, *arguments: object) -> None:
        """Call by reference: str -> one character, int -> integer, float, array -> pointer.

        The lengths of the characters follow all arguments, as gfortran passes them. Wherever a
        routine has an ``info`` it is the last argument: ``None`` stands for it.
        """
        real = C_FLOATS[name[0]]
        info = ctypes.c_int64(0)
        values: list[object] = []
        lengths: list[object] = []
        for argument in arguments:
            if isinstance(argument, str):
                values.append(argument.encode())
                lengths.append(ctypes.c_size_t(1))
            elif isinstance(argument, np.ndarray):
                values.append(ctypes.c_void_p(argument.ctypes.data))
            elif isinstance(argument, float):
                values.append(ctypes.byref(real(argument)))
            elif argument is None:
                values.append(ctypes.byref(info))
            else:
                values.append(ctypes.byref(ctypes.c_int64(cast(int, argument))))
        self._function(name)(*values, *lengths)
        if info.value:
            raise LapackError(f"LAPACK {name} returned info = {info.value}")

    def syrk(self, rows: np.ndarray, beta: float, c: np.ndarray) -> None:
        """c = beta c + rows^T rows, lower triangle only.

        rows: (k, n), a block of rows of the weight matrix, in C or Fortran order; c: (n, n).
        """
        k, n = rows.shape
        name = LETTERS[rows.dtype] + "syrk"
        if rows.flags.c_contiguous:  # in Fortran's eyes (n, k): c = R R^T
            self._call(name, "L", "N", n, k, 1.0, rows, max(1, n), beta, c, ld(c))
        else:
            self._call(name, "L", "T", n, k, 1.0, rows, ld(rows), beta, c, ld(c))

    def gemm(
        self,
        ta: str,
        tb: str,
        alpha: float,
        a: np.ndarray,
        b: np.ndarray,
        beta: float,
        c: np.ndarray,
    ) -> None:
        """c = beta c + alpha op(a) op(b), all Fortran-ordered (views with unit first stride)."""
        m, n = c.shape
        k = a.shape[1] if ta == "N" else a.shape[0]
        letter = LETTERS[c.dtype]
        self._call(letter + "gemm", ta, tb, m, n, k, alpha, a, ld(a), b, ld(b), beta, c, ld(c))

    def symm(self, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
        """c = a b, of a symmetric a only the lower triangle; b and c (n, k).

        By products of its block columns: where k is small they take 0.8 of BLAS's symm's time.
        """
        n, k = c.shape
        name = LETTERS[c.dtype] + "symm"
        for j in range(0, n, BLOCK):
            end, beta = min(j + BLOCK, n), float(j > 0)
            square, below, own = a[j:end, j:end], a[end:, j:end], c[j:end]
            sizes = ("L", "L", end - j, k, 1.0)
            self._call(name, *sizes, square, ld(square), b[j:end], ld(b), beta, own, ld(c))
            if end < n:
                self.gemm("N", "N", 1.0, below, b[j:end], beta, c[end:])
                self.gemm("T", "N", 1.0, below, b[end:], 1.0, own)

    def syr2k(self, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
        """c = c - a b^T - b a^T, lower triangle only; a and b (n, k)."""
        n, k = a.shape
        name = LETTERS[c.dtype] + "syr2k"
        self._call(name, "L", "N", n, k, -1.0, a, ld(a), b, ld(b), 1.0, c, ld(c))

    def trmm(
        self, side: str, uplo: str, trans: str, alpha: float, a: np.ndarray, b: np.ndarray
    ) -> None:
        """b = alpha op(a) b (side L) or alpha b op(a) (side R), a triangular, non-unit."""
        m, n = b.shape
        letter = LETTERS[b.dtype]
        self._call(letter + "trmm", side, uplo, trans, "N", m, n, alpha, a, ld(a), b, ld(b))

    def geqrt(self, a: np.ndarray, t: np.ndarray) -> None:
        """QR, a = (I - V T V^T) R; t (nb, k), nb its block. V under a's diagonal, R above."""
        m, n = a.shape
        work = np.empty(t.shape[0] * n, a.dtype)
        letter = LETTERS[a.dtype]
        self._call(letter + "geqrt", m, n, t.shape[0], a, ld(a), t, ld(t), work, None)

    def reflectors(self, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """QR of a (m, n) by k = min(m, n) reflections, a = (I - V T V^T) R: returns R (k, n) and T.

        V, with its ones and zeros, takes the place of a's first k columns.
        """
        k = min(a.shape)
        t = np.empty((k, k), a.dtype, order="F")
        self.geqrt(a, t)
        r = np.triu(a[:k])
        a[:k] = np.tril(a[:k], -1)
        a[np.arange(k), np.arange(k)] = 1
        return r, np.asfortranarray(np.triu(t))

    def potrf(self, a: np.ndarray) -> None:
        """Cholesky, a = L L^T: L takes the place of a's lower triangle.

        Raises:
            LapackError: a is not positive definite.
        """
        self._call(LETTERS[a.dtype] + "potrf", "L", len(a), a, ld(a), None)

    def potrs(self, factor: np.ndarray, b: np.ndarray) -> np.ndarray:
        """a^-1 b, (n, k), from ``potrf``'s factor of a."""
        x = np.array(b, factor.dtype, order="F")
        head = (LETTERS[x.dtype] + "potrs", "L", *x.shape)
        self._call(*head, factor, ld(factor), x, ld(x), None)
        return x

    def sytrd(self, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tridiagonal (d, e) of a symmetric matrix given by its lower triangle; a is lost."""
        n, kind = a.shape[0], a.dtype
        d, e, tau = np.empty(n, kind), np.empty(max(1, n - 1), kind), np.empty(max(1, n - 1), kind)
        name = LETTERS[kind] + "sytrd"
        query = np.empty(1, kind)
        self._call(name, "L", n, a, ld(a), d, e, tau, query, -1, None)
        work = np.empty(int(query[0]), kind)
        self._call(name, "L", n, a, ld(a), d, e, tau, work, len(work), None)
        return d, e[: n - 1]

    def sb2st(self, band: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tridiagonal (d, e) of a symmetric band in lower storage (kd + 1, n); band is lost."""
        kd, n, kind = band.shape[0] - 1, band.shape[1], band.dtype
        d, e = np.empty(n, kind), np.empty(max(1, n - 1), kind)
        name = LETTERS[kind] + "sytrd_sb2st"
        query, query_v = np.empty(1, kind), np.empty(1, kind)
        head = ("Y", "N", "L", n, kd, band, ld(band), d, e)
        self._call(name, *head, query_v, -1, query, -1, None)
        v, work = np.empty(int(query_v[0]), kind), np.empty(int(query[0]), kind)
        self._call(name, *head, v, len(v), work, len(work), None)
        return d, e[: n - 1]

    def sterf(self, d: np.ndarray, e: np.ndarray) -> np.ndarray:
        """Ascending eigenvalues of a tridiagonal matrix (root-free QL/QR), in float64."""
        d = d.astype(np.float64)
        e = np.concatenate([e, [0.0]]).astype(np.float64)
        self._call("dsterf", len(d), d, e, None)
        return d


def ld(a: np.ndarray) -> int:
    """Leading dimension of a Fortran-ordered matrix (or a view of one)."""
    assert a.strides[0] == a.itemsize, "not Fortran-ordered"
    return max(1, a.strides[1] // a.itemsize, a.shape[0])


@functools.cache
def load() -> Lapack | None:
    """The library, loaded once; None where the package is absent or not as expected."""
    spec = importlib.util.find_spec("scipy_openblas64")  # found, never imported: see Lapack
    for place in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(place, "lib").glob("*scipy_openblas*")):
            if path.suffix not in (".so", ".dylib", ".dll"):
                continue
            try:
                return Lapack(path)
            except (OSError, AttributeError):
                continue
    return None
