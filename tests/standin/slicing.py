"""Stand-in slicing: an overview, and above scale x scale pixels a grid of tiles."""

import math


def rounded(length, patch):
    """The nearest multiple of the patch size, at least one."""
    return max(round(length / patch), 1) * patch


def grid_of(size, max_slice_nums, scale):
    """(columns, rows) of the tiles, or None for a photo that stays whole."""
    wide, high = size
    count = min(math.ceil(wide * high / scale ** 2), max_slice_nums)
    if count <= 1:
        return None
    grids = [(columns, count // columns) for columns in range(1, count + 1) if count % columns == 0]
    return min(grids, key=lambda grid: abs(math.log(wide / high) - math.log(grid[0] / grid[1])))


def fitted(photo, patch, scale):
    """The photo with at most scale x scale pixels and sides in whole patches."""
    shrink = min(1.0, scale / math.sqrt(photo.width * photo.height))
    return photo.resize((rounded(photo.width * shrink, patch), rounded(photo.height * shrink, patch)))


def sliced(photo, max_slice_nums, patch, scale):
    """The overview, then the tiles row by row."""
    slices = [fitted(photo, patch, scale)]
    grid = grid_of(photo.size, max_slice_nums, scale)
    if grid:
        columns, rows = grid
        tile = fitted(photo.resize((max(photo.width // columns, 1), max(photo.height // rows, 1))), patch, scale).size
        whole = photo.resize((tile[0] * columns, tile[1] * rows))
        slices += [whole.crop((column * tile[0], row * tile[1], (column + 1) * tile[0], (row + 1) * tile[1]))
                   for row in range(rows) for column in range(columns)]
    return slices
