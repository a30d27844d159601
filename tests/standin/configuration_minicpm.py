"""Stand-in configuration: a Qwen2 text model with the switches and sizes of the other parts."""

from transformers import Qwen2Config


class MiniCPMOConfig(Qwen2Config):
    """As the real one, a text configuration that also holds everything else."""

    model_type = "minicpmo"

    def __init__(self, query_num=4, patch_size=16, vision_size=16, init_vision=True, init_audio=True, init_tts=True,
                 **kwargs):
        self.query_num = query_num
        self.patch_size = patch_size
        self.vision_size = vision_size
        self.init_vision = init_vision
        self.init_audio = init_audio
        self.init_tts = init_tts
        super().__init__(**kwargs)
