"""Every mechanism in a plain transformer, a ResNet and the windows of Swin: trained and evaluated, or refused."""

import pytest
import timm.optim
import torch

from zoo import list_attentions
from zoo.catalogue import HOSTS, attentions_in, create_host, hosts_of, refusals

# Who is refused where, and words of the reason. A new mechanism works everywhere, or stands here.
PASSES = "hands the class token on unchanged"
HALVES = "halves the heads, but num_heads=3 is odd"
NO_MASK = "takes no key mask"
REFUSED = {
    ("single_head", "vit"): PASSES,
    ("local_relation", "vit"): PASSES,
    ("halo", "vit"): PASSES,
    ("lambda", "vit"): PASSES,
    ("cross_window", "vit"): HALVES,
    ("cross_window", "vit without class token"): HALVES,
    ("cross_window", "swin windows"): HALVES,
    # A grid that windows do not divide, or a shift, needs a mask.
    ("halo", "swin windows"): NO_MASK,
    ("lambda", "swin windows"): NO_MASK,
}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("attn", list_attentions())
def test_works_or_is_refused_with_the_reason(attn, host):
    if (attn, host) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[attn, host]) as error:
            create_host(host, attn).eval()(torch.zeros(1, 3, 64, 64))
        assert refusals(attn)[host] == str(error.value)
        return
    torch.manual_seed(1)
    model = create_host(host, attn)
    assert attn in attentions_in(model)
    # Twelve rows and eight columns of Swin's tokens are no multiple of its windows of seven.
    images = torch.randn(2, 3, 48, 32, generator=torch.Generator().manual_seed(2))
    weight = torch.randn(2, 5, generator=torch.Generator().manual_seed(3))
    (model.train()(images) * weight).sum().backward()
    silent = [key for key, value in model.named_parameters() if value.grad is None or not value.grad.isfinite().all()]
    assert not silent
    with torch.no_grad():
        out = model.eval()(images)
        assert out.isfinite().all()
        torch.testing.assert_close(model(images[:1]), out[:1], rtol=1e-4, atol=1e-5)  # float32, other batch


@pytest.mark.parametrize(
    ("attn", "hosts"),
    [
        ("softmax", "vit, attention_resnet, swin windows"),
        ("halo", "vit without class token, attention_resnet"),
        ("cross_window", "attention_resnet"),
    ],
)
def test_hosts_in_words(attn, hosts):
    assert hosts_of(attn) == hosts


@pytest.mark.parametrize("host", HOSTS)
def test_what_starts_with_a_meaning_does_not_decay(host):
    """Every number that timm would let decay, of every mechanism, is a weight of projections or mixes freely."""
    starts = {
        "head_embedding": {"q_embed", "k_embed", "v_embed"},
        "persistent_memory": {"memory_k", "memory_v"},
        "multi_token": {"logit_kernel", "weight_kernel", "logit_mix", "weight_mix"},
        "hedgehog": {"q_map", "q_offset", "k_map", "k_offset"},
        "normalized": {"gamma", "beta"},
        "softmax": set(),
    }
    for attn, names in starts.items():
        model = create_host(host, attn)
        groups = timm.optim.param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
        decays = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        found = {key.rpartition(".")[2]: id(p) in decays for key, p in model.named_parameters()}
        assert {key for key in names if not found[key]} == names
        assert found["weight"]  # of a linear layer or convolution
