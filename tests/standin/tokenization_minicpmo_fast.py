"""Stand-in tokenizer: Qwen2's, which knows its photo markers."""

from transformers import Qwen2TokenizerFast


class MiniCPMOTokenizerFast(Qwen2TokenizerFast):
    """The markers are attributes, as in the real one."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.im_start = "<image>"
        self.im_end = "</image>"
        self.slice_start = "<slice>"
        self.slice_end = "</slice>"
        self.im_id_start = "<image_id>"
        self.im_id_end = "</image_id>"
