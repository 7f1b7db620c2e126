"""Tiny question-answering models with random weights, one of each family, and inputs to calibrate with."""

import torch
import transformers as t

from bert_evaluation.capturing import text_inputs

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 530,
}
ONE_TYPE = {"type_vocab_size": 1}
SPECIAL = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
BY_TERM = {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}

MADE_OF = {
    "bert": (t.BertForQuestionAnswering, t.BertConfig, SIZES),
    "roberta": (t.RobertaForQuestionAnswering, t.RobertaConfig, SIZES | ONE_TYPE),
    "distilbert": (
        t.DistilBertForQuestionAnswering,
        t.DistilBertConfig,
        {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    ),
    "electra": (t.ElectraForQuestionAnswering, t.ElectraConfig, SIZES | {"embedding_size": 16}),
    "albert": (t.AlbertForQuestionAnswering, t.AlbertConfig, SIZES | {"embedding_size": 16}),
    "mpnet": (t.MPNetForQuestionAnswering, t.MPNetConfig, SIZES),
    "camembert": (t.CamembertForQuestionAnswering, t.CamembertConfig, SIZES | ONE_TYPE),
    "xlm-roberta": (t.XLMRobertaForQuestionAnswering, t.XLMRobertaConfig, SIZES | ONE_TYPE),
    "deberta-v2": (t.DebertaV2ForQuestionAnswering, t.DebertaV2Config, SIZES | BY_TERM),
    "modernbert": (t.ModernBertForQuestionAnswering, t.ModernBertConfig, SIZES | SPECIAL),
    "mobilebert": (
        t.MobileBertForQuestionAnswering,
        t.MobileBertConfig,
        SIZES | {"embedding_size": 32, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    ),
}
FAMILIES = tuple(MADE_OF)


def tiny(name, **more):
    """A model with random weights, its biases not zero, in eval mode."""
    torch.manual_seed(0)
    model, config, arguments = MADE_OF[name]
    made = model(config(**(arguments | more))).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def lively(family, **more):
    """A tiny model whose every part matters: weights as large as those of a trained one."""
    model = tiny(family, **more)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
    return model


def batches(model):
    """Inputs of random tokens, some of them padding."""
    made = []
    for batch, length in ((2, 12), (3, 20)):
        inputs = text_inputs(model, batch, length)
        inputs["input_ids"] = torch.randint(3, model.config.vocab_size, (batch, length))
        inputs["attention_mask"][0, length // 2 :] = 0
        made.append(inputs)
    return tuple(made)
