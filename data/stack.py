"""Arrays of slices that lie in many files and look like one array: Stack."""

import numpy as np

OPEN_FILES = 64         # files that are mapped at a time; some systems allow 256 open files in all


class Stack:
    """The slices of all subjects, one after the other, without having them in memory.

    Every subject has a file of its own. stack[rows] reads only the rows that are asked for, and
    returns an ordinary array. len, shape, dtype and ndim are those of the whole array.
    """

    def __init__(self, parts, shape, dtype):
        """parts: For each file (path, offset in bytes, number of rows). shape: Of one row."""
        self.parts = parts
        self.dtype = np.dtype(dtype)
        counts = [count for path, offset, count in parts]
        self.ends = np.cumsum(counts)                   # the row behind the last row of each file
        self.shape = (int(sum(counts)), *shape)
        self.maps = {}                                  # number of the file -> memory-mapped array

    def __len__(self):
        return self.shape[0]

    @property
    def ndim(self):
        return len(self.shape)

    def __getitem__(self, index):
        """index: One row, a slice, an array of rows or an array of bool, or a tuple.

        In a tuple, the rows come first. Numbers and slices may follow for the other axes, as in
        stack[rows, channel]. The result is what NumPy gives for one large array.
        IndexError if a row does not exist, or for any other kind of index.
        """
        index = index if isinstance(index, tuple) else (index,)
        rest = index[1:]
        if not all(isinstance(part, (int, np.integer, slice)) for part in rest):
            raise IndexError("behind the rows there may be numbers and slices only; "
                             "choose the rows first and index the result")
        if not isinstance(index[0], (int, np.integer, slice, list, np.ndarray)):
            raise IndexError(f"rows cannot be chosen by {index[0]!r}")
        rows = np.arange(len(self))[index[0]]           # raises IndexError as NumPy does
        flat = np.atleast_1d(rows).ravel()
        row_shape = np.empty(self.shape[1:], np.bool_)[rest].shape
        result = np.empty((len(flat), *row_shape), self.dtype)
        for i in np.argsort(flat, kind="stable"):       # in the order of the files
            result[i] = self._row(int(flat[i]))[rest]
        return result.reshape(*np.shape(rows), *row_shape)

    def __array__(self, dtype=None, copy=None):
        """All slices in memory, for np.array(stack)."""
        if copy is False:
            raise ValueError("a Stack cannot become an array without a copy")
        return self[:].astype(dtype or self.dtype, copy=False)

    def _row(self, row):
        """One row as a memory-mapped array. Nothing is read yet."""
        number = int(np.searchsorted(self.ends, row, side="right"))
        path, offset, count = self.parts[number]
        if number not in self.maps:
            if len(self.maps) >= OPEN_FILES:
                self.maps.clear()
            self.maps[number] = np.memmap(path, self.dtype, "r", offset, (count, *self.shape[1:]))
        return self.maps[number][row - (self.ends[number] - count)]
