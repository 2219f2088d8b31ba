"""A model is left as it was: what is looked at, and the comparison."""

import copy

import torch


def state(model) -> dict:
    """Everything about a model that a scan could leave behind."""
    return {
        "weights": {k: v.clone() for k, v in model.state_dict().items()},
        "attention": [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")],
        "config": copy.deepcopy(model.config.to_dict()),
        "training": [m.training for m in model.modules()],
        "attributes": [sorted(k for k in m.__dict__) for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "grad": [p.requires_grad for p in model.parameters()],
    }


def assert_same(before: dict, after: dict) -> None:
    weights = before.pop("weights"), after.pop("weights")
    assert before == after
    assert all(torch.equal(x, weights[1][k]) for k, x in weights[0].items())
