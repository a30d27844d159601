"""Stand-in processor: photo markers in the text become placeholders; ids are int32, bounds say where the slices go."""

import torch
import torchaudio  # noqa: F401
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .image_processing_minicpmv import MiniCPMVImageProcessor  # noqa: F401


class MiniCPMOProcessor(ProcessorMixin):
    """One text and one list of photos a prompt."""

    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor=None, tokenizer=None):
        super().__init__(image_processor, tokenizer)
        self.version = image_processor.version

    def __call__(self, text, images=None, max_slice_nums=None, use_image_id=None, return_tensors=None, **kwargs):
        marker = "<image>./</image>" if self.version >= 4.5 else "(<image>./</image>)"
        encoded = self.image_processor(images, max_slice_nums=max_slice_nums)
        ids, bounds = [], []
        for prompt, sizes in zip(text, encoded["image_sizes"], strict=True):
            parts = prompt.split(marker)
            assert len(parts) == len(sizes) + 1
            spans = [self.image_processor.get_slice_image_placeholder(size, index, max_slice_nums)
                     for index, size in enumerate(sizes)]
            expanded = parts[0] + "".join(span + part for span, part in zip(spans, parts[1:], strict=True))
            row = torch.tensor(self.tokenizer.encode(expanded), dtype=torch.int32)
            starts = torch.isin(row, self.marker_ids("im_start", "slice_start")).nonzero()[:, 0] + 1
            ends = torch.isin(row, self.marker_ids("im_end", "slice_end")).nonzero()[:, 0]
            ids.append(row)
            bounds.append(torch.stack([starts, ends], dim=1))
        return BatchFeature({"input_ids": torch.stack(ids), "image_bound": bounds, **encoded})

    def marker_ids(self, *names):
        return torch.tensor([self.tokenizer.convert_tokens_to_ids(getattr(self.tokenizer, name)) for name in names])
