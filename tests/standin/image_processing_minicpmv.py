"""Stand-in image processor: lists of slices, each (3, patch, patches * patch), and their sizes in patches."""

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_transforms import normalize, to_channel_dimension_format
from transformers.image_utils import infer_channel_dimension_format

from .slicing import grid_of, sliced


class MiniCPMVImageProcessor(BaseImageProcessor):
    """Takes one list of photos a prompt."""

    model_input_names = ["pixel_values"]

    def __init__(self, max_slice_nums=4, scale_resolution=64, patch_size=16, image_feature_size=4, version=2.6,
                 **kwargs):
        super().__init__(**kwargs)
        self.max_slice_nums = max_slice_nums
        self.scale_resolution = scale_resolution
        self.patch_size = patch_size
        self.image_feature_size = image_feature_size
        self.version = version

    def preprocess(self, images, max_slice_nums=None, **kwargs):
        limit = max_slice_nums or self.max_slice_nums
        pixels, sizes = [], []
        for photos in images:
            if not all(isinstance(photo, Image.Image) for photo in photos):
                raise ValueError("a photo is a PIL image")
            slices = [piece for photo in photos
                      for piece in sliced(photo.convert("RGB"), limit, self.patch_size, self.scale_resolution)]
            # As in the real one, the first photo says for all which axis is that of the colours.
            axis = infer_channel_dimension_format(np.asarray(photos[0])) if photos else None
            pixels.append([self.in_patches(piece, axis) for piece in slices])
            sizes.append(torch.tensor([[piece.height // self.patch_size, piece.width // self.patch_size]
                                       for piece in slices]) if slices else [])
        return BatchFeature({"pixel_values": pixels, "tgt_sizes": sizes,
                             "image_sizes": [[photo.size for photo in photos] for photos in images]})

    def in_patches(self, piece, axis):
        pixels = normalize(np.asarray(piece, dtype=np.float32) / 255, [0.5] * 3, [0.5] * 3, input_data_format=axis)
        pixels = torch.from_numpy(to_channel_dimension_format(pixels, "channels_first", axis))  # (3, H, W)
        rows = pixels.split(self.patch_size, dim=1)
        return torch.cat(rows, dim=2)  # (3, patch, patches * patch), patches row by row

    def get_slice_image_placeholder(self, size, index, max_slice_nums=None):
        place = "<unk>" * self.image_feature_size
        grid = grid_of(size, max_slice_nums or self.max_slice_nums, self.scale_resolution)
        tiles = "\n".join([f"<slice>{place}</slice>" * grid[0]] * grid[1]) if grid else ""
        return f"<image_id>{index}</image_id><image>{place}</image>{tiles}"


AutoImageProcessor.register("MiniCPMVImageProcessor", MiniCPMVImageProcessor)
