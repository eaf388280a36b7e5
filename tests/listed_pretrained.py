"""The list-of-experts model of `listed` as a transformers model with a config, so that it has checkpoints."""

from __future__ import annotations

from listed import Listed
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


class ListedConfig(PreTrainedConfig):
    model_type = "listed"


class ListedForLM(PreTrainedModel):
    config_class = ListedConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = Listed()
        self.post_init()

    def forward(self, ids):
        return self.model(ids)

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
