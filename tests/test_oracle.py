"""The oracle of the other tests is itself held against the released code, transformers, torch and slow loops."""

import dataclasses
import json
import math
from pathlib import Path

import oracle
import pytest
import torch
from oracle import START, TEXT_TARGET, VISUAL, VISUAL_TARGET, Sizes
from safetensors import safe_open

GOLDEN = Path(__file__).parent / "golden"

# Golden values were computed in float32. One rounding is 6e-8 of a value; an output has passed some 20 matrix products
# of up to 588 terms, each adding a few roundings, and with signs at random that makes about 1e-6 of the scale of the
# tensor, a few times more for the worst of thousands of elements (2.5e-6 was measured). Mistakes are far above: the
# smallest one tried, a decoder eps of 1e-5 for 1e-6, shifts logits by 7e-4 of the scale. The eps of the encoder is the
# exception: what it normalises here is so large that it does not show, so test_encoder_eps looks at it by itself.
GOLDEN_TOLERANCE = 1e-5

# For two computations of one formula in float64 (rounding 1e-16): a thousand roundings of slack, and still far below
# any change of the formula.
EXACT = 1e-12


def difference(actual, expected):
    """The largest absolute difference relative to the scale (largest magnitude) of the expected tensor."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max())


class Golden:
    """One file of golden vectors, its floating-point tensors in ``dtype``."""

    def __init__(self, model, dtype):
        with safe_open(GOLDEN / f"emu2_{model}_tiny.safetensors", "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        self.tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        self.weights = {name[2:]: t for name, t in self.tensors.items() if name.startswith("w.")}
        self.special = json.loads(metadata["special_tokens"])
        self.queries, self.frame_queries = int(metadata["n_query"]), int(metadata["v_query"])
        self.sizes = Sizes(
            encoder_heads=int(metadata["vision_heads"]),
            decoder_heads=int(metadata["heads"]),
            patch_size=int(metadata["patch_size"]),
            decoder_eps=float(metadata["rms_norm_eps"]),
            rope_theta=float(metadata["rope_theta"]),
        )

    def __getitem__(self, name):
        return self.tensors[name]

    def features(self, pictures):
        """What the released code put into the <image> slots, [R, E]."""
        return self["out.features"][pictures].flatten(0, 1)


# float32 shows that the oracle works in the dtype of its weights; in float64 the difference is that of golden alone.
@pytest.fixture(params=[(m, d) for m in ("base", "chat") for d in (torch.float32, torch.float64)], ids=str)
def golden(request):
    return Golden(*request.param)


def test_encoder_matches_golden(golden):
    hidden = oracle.encode(golden.weights, golden.sizes, golden["in.pixels"])
    assert hidden.dtype == golden["in.pixels"].dtype
    assert difference(hidden, golden["out.encoder_hidden"]) < GOLDEN_TOLERANCE
    assert difference(oracle.pool(hidden, golden.queries), golden["out.features"]) < GOLDEN_TOLERANCE

    frames = oracle.pool(oracle.encode(golden.weights, golden.sizes, golden["in.frames"]), golden.frame_queries)
    assert difference(frames, golden["out.frame_features"]) < GOLDEN_TOLERANCE


@pytest.mark.parametrize(("sequence", "pictures"), [(0, [0]), (1, [1, 2]), (2, [])])
def test_decoder_matches_golden(golden, sequence, pictures):
    tokens = golden[f"in.tokens.{sequence}"]
    mask = tokens == golden.special["<image>"]
    assert int(mask.sum()) == len(pictures) * golden.queries
    hidden, logits = oracle.decode(golden.weights, golden.sizes, tokens, mask, golden.features(pictures))
    assert hidden.dtype == logits.dtype == golden["out.features"].dtype
    assert difference(hidden, golden[f"out.hidden.{sequence}"]) < GOLDEN_TOLERANCE
    assert difference(logits, golden[f"out.logits.{sequence}"]) < GOLDEN_TOLERANCE
    regressed = hidden @ golden.weights["project_down.weight"].T
    assert difference(regressed, golden[f"out.regressed.{sequence}"]) < GOLDEN_TOLERANCE


@pytest.mark.parametrize(("name", "prompt"), [("text", "draw"), ("edit", "edit")])
def test_losses_vanish_on_golden_images(golden, name, prompt):
    """Released code draws an image by feeding each prediction back: it fixes which position predicts which feature.

    So where a drawn image is the target, every prediction meets it.
    """
    drawn = golden[f"out.generate_image.{name}"][0]
    appended = [golden.special["[IMG]"]] + [golden.special["<image>"]] * golden.queries
    tokens = torch.cat([golden[f"in.tokens.{prompt}"], torch.tensor([appended])], dim=1)
    features = torch.cat([golden.features([0] if prompt == "edit" else []), drawn])
    roles = torch.where(tokens == golden.special["<image>"], VISUAL, 0)
    roles[:, -golden.queries :] |= VISUAL_TARGET
    result = oracle.losses(golden.weights, golden.sizes, tokens, roles, features)
    assert result["visual_count"] == golden.queries
    # The released loop predicts all embeddings afresh at every step, so what it returns differs by rounding (1e-6) from
    # what it had fed in, and these random weights magnify a difference about 1.5 times a position, over 16 positions.
    # A feature predicted from a wrong position differs by the scale itself. The loss is a mean square: square the rest.
    assert result["image"].item() < (1e-3 * drawn.abs().max().item()) ** 2


@pytest.mark.parametrize(("name", "slot"), [("greedy", "<image>"), ("video", "[gIMG]")])
def test_greedy_text_matches_golden(golden, name, slot):
    """Ids, hence exactly, if rounding cannot decide: the two best logits are further apart than the tolerance."""
    tokens = golden[f"in.tokens.{name}"]
    features = golden["out.frame_features"].flatten(0, 1) if name == "video" else golden.features([0])
    expected = golden[f"out.generate.{name}"]
    prompt = tokens.shape[1]
    tokens = torch.cat([tokens, expected], dim=1)
    # By causality one pass over the whole text says what would follow each part of it.
    _, logits = oracle.decode(golden.weights, golden.sizes, tokens, tokens == golden.special[slot], features)
    logits = logits[:, prompt - 1 : -1]
    best = logits.topk(2, dim=-1).values
    assert float((best[..., 0] - best[..., 1]).min()) > 2 * GOLDEN_TOLERANCE * float(logits.abs().max())
    assert torch.equal(logits.argmax(dim=-1), expected)


# ----------------------------------------------------------------------------------------------------------------------


def llama(attention_heads=4, seed=0):
    """A random transformers LLaMA in float64 and the same weights under the oracle's names."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=attention_heads,
        num_key_value_heads=attention_heads,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norm weights start at one, which would hide a missing one; the rest gets a scale at which attention is
            # far from uniform, or its details would not show.
            parameter.copy_(torch.randn_like(parameter) * (1.0 if parameter.dim() == 1 else 0.3))
    weights = {f"decoder.lm.{name}": tensor for name, tensor in model.state_dict().items()}
    weights["project_up.weight"] = torch.randn(32, 6, dtype=torch.float64)
    weights["project_down.weight"] = torch.randn(6, 32, dtype=torch.float64) * 0.2
    return model, weights, Sizes(encoder_heads=2, decoder_heads=attention_heads, decoder_eps=1e-5, rope_theta=500.0)


# transformers computes RMSNorm and the rotary angles in float32 whatever the dtype of the model: roundings of 6e-8 in
# either, and in an angle 6e-8 of its size, at most 40 here, so 2e-6 radians; two layers double that.
LLAMA_TOLERANCE = 5e-6


def test_decoder_matches_transformers():
    model, weights, sizes = llama()
    tokens = torch.randint(50, (3, 40))
    with torch.no_grad():
        expected = model(tokens, output_hidden_states=True)
    hidden, logits = oracle.decode(
        weights, sizes, tokens, torch.zeros_like(tokens, dtype=torch.bool), torch.zeros(0, 6, dtype=torch.float64)
    )
    assert difference(hidden, expected.hidden_states[-1]) < LLAMA_TOLERANCE
    assert difference(logits, expected.logits) < LLAMA_TOLERANCE
    # What the tolerance must tell apart: the eps and the theta of this model are not the defaults.
    for change in ({"decoder_eps": 1e-6}, {"rope_theta": 10000.0}):
        _, other = oracle.decode(
            weights,
            dataclasses.replace(sizes, **change),
            tokens,
            torch.zeros_like(tokens, dtype=torch.bool),
            torch.zeros(0, 6, dtype=torch.float64),
        )
        assert difference(other, expected.logits) > 10 * LLAMA_TOLERANCE, change


def test_decoder_places_features_in_row_major_order():
    """Against transformers' inputs_embeds, filled one row at a time."""
    model, weights, sizes = llama()
    tokens = torch.randint(50, (2, 9))
    mask = torch.zeros(2, 9, dtype=torch.bool)
    places = [(0, 2), (0, 3), (0, 7), (1, 0), (1, 3), (1, 8)]
    features = torch.randn(len(places), 6, dtype=torch.float64)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(tokens).clone()
        for place, feature in zip(places, features, strict=True):
            mask[place] = True
            embedded[place] = weights["project_up.weight"] @ feature
        expected = model(inputs_embeds=embedded).logits
    assert difference(oracle.decode(weights, sizes, tokens, mask, features)[1], expected) < LLAMA_TOLERANCE
    assert difference(oracle.decode(weights, sizes, tokens, mask, features.flip(0))[1], expected) > 0.01

    with pytest.raises(ValueError, match="5 features for 6 visual positions"):
        oracle.decode(weights, sizes, tokens, mask, features[:5])


def test_pool_averages_squares():
    """A 4 x 4 grid numbered 1..16, with a CLS that would show."""
    grid = torch.cat([torch.tensor([1000.0]), torch.arange(1.0, 17.0)]).reshape(1, 17, 1)
    assert oracle.pool(grid, 16).flatten().tolist() == list(range(1, 17))
    assert oracle.pool(grid, 4).flatten().tolist() == [3.5, 5.5, 11.5, 13.5]
    assert oracle.pool(grid, 1).flatten().tolist() == [8.5]
    for queries in (0, 9, 8, 64):
        with pytest.raises(ValueError, match=f"16 patches cannot be pooled into {queries} squares"):
            oracle.pool(grid, queries)


# ----------------------------------------------------------------------------------------------------------------------


def random_encoder(seed=0):
    """A tiny encoder in float64: 4 x 6 pixels, patch 2, 6 patches, width 4, 2 heads, 2 layers, MLP 5."""
    torch.manual_seed(seed)
    shapes = {
        "visual.cls_token": (1, 1, 4),
        "visual.pos_embed": (1, 7, 4),
        "visual.patch_embed.proj.weight": (4, 3, 2, 2),
        "visual.patch_embed.proj.bias": (4,),
    }
    for i in range(2):
        shapes |= {
            f"visual.blocks.{i}.{name}": shape
            for name, shape in {
                "attn.qkv.weight": (12, 4),
                "attn.q_bias": (4,),
                "attn.v_bias": (4,),
                "attn.proj.weight": (4, 4),
                "attn.proj.bias": (4,),
                "norm1.weight": (4,),
                "norm1.bias": (4,),
                "norm2.weight": (4,),
                "norm2.bias": (4,),
                "mlp.fc1.weight": (5, 4),
                "mlp.fc1.bias": (5,),
                "mlp.fc2.weight": (4, 5),
                "mlp.fc2.bias": (4,),
            }.items()
        }
    weights = {name: torch.randn(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()}
    return weights, Sizes(encoder_heads=2, decoder_heads=2, patch_size=2)


def test_encoder_patches_are_a_convolution():
    """Height and width differ, so that exchanging them shows."""
    weights, sizes = random_encoder()
    # Without blocks the encoder is the patch embedding and the positions.
    weights = {name: tensor for name, tensor in weights.items() if ".blocks." not in name}
    pixels = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    convolved = torch.nn.functional.conv2d(
        pixels, weights["visual.patch_embed.proj.weight"], weights["visual.patch_embed.proj.bias"], stride=2
    )
    expected = torch.cat([weights["visual.cls_token"].expand(2, 1, 4), convolved.flatten(2).transpose(1, 2)], dim=1)
    actual = oracle.encode(weights, sizes, pixels)
    assert difference(actual, expected + weights["visual.pos_embed"]) < EXACT

    with pytest.raises(ValueError, match="pos_embed has shape"):
        oracle.encode(weights, sizes, pixels[..., :4])
    with pytest.raises(ValueError, match="whole patches"):
        oracle.encode(weights, sizes, pixels[..., :5])


def test_encoder_eps():
    """With no weights in the projections, every branch is the norm of a bias, small enough here for eps to count."""
    weights, sizes = random_encoder()
    for i in range(2):
        for name in ("attn.proj", "mlp.fc2"):
            weights[f"visual.blocks.{i}.{name}.weight"] = torch.zeros_like(weights[f"visual.blocks.{i}.{name}.weight"])
            weights[f"visual.blocks.{i}.{name}.bias"] = torch.randn(4, dtype=torch.float64) * 1e-3
    pixels = torch.randn(1, 3, 4, 6, dtype=torch.float64)
    expected = oracle.encode({name: t for name, t in weights.items() if ".blocks." not in name}, sizes, pixels)
    for i in range(2):
        for norm, name in (("norm1", "attn.proj"), ("norm2", "mlp.fc2")):
            expected = expected + torch.nn.functional.layer_norm(
                weights[f"visual.blocks.{i}.{name}.bias"],
                (4,),
                weights[f"visual.blocks.{i}.{norm}.weight"],
                weights[f"visual.blocks.{i}.{norm}.bias"],
                eps=1e-6,
            )
    assert difference(oracle.encode(weights, sizes, pixels), expected) < EXACT
    other = dataclasses.replace(sizes, encoder_eps=1e-5)
    assert difference(oracle.encode(weights, other, pixels), expected) > 0.01


def test_encoder_gradients():
    """Autograd against finite differences for every weight and the pixels: nothing is detached, written over or kinked.

    gradcheck's defaults suit float64: central differences with a step of 1e-6 are right to about 1e-9 of values of
    order 1, and it allows 1e-5 + 1e-3 of the value.
    """
    weights, sizes = random_encoder()
    names = list(weights)
    pixels = torch.randn(1, 3, 4, 6, dtype=torch.float64, requires_grad=True)

    def encode(pixels, *tensors):
        return oracle.encode(dict(zip(names, tensors, strict=True)), sizes, pixels)

    assert torch.autograd.gradcheck(encode, (pixels, *weights.values()))
    # gradcheck would also accept a constant function.
    gradients = torch.autograd.grad(encode(pixels, *weights.values()).square().sum(), (pixels, *weights.values()))
    for name, gradient in zip(["pixels", *names], gradients, strict=True):
        assert float(gradient.abs().max()) > 1e-3, name


# ----------------------------------------------------------------------------------------------------------------------


def loss_case():
    """Two sequences with every combination of roles: (weights, sizes, tokens, roles, features [5, 6])."""
    _, weights, sizes = llama(seed=3)
    weights = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    tokens = torch.randint(50, (2, 8))
    image = VISUAL | VISUAL_TARGET
    roles = torch.tensor(
        [
            [0, TEXT_TARGET, 0, image, image, TEXT_TARGET, TEXT_TARGET, 0],
            [VISUAL, VISUAL | TEXT_TARGET, TEXT_TARGET, 0, 0, 0, image | TEXT_TARGET, TEXT_TARGET],
        ]
    )
    features = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    return weights, sizes, tokens, roles, features


def slow_losses(weights, sizes, tokens, roles, features, targets):
    """losses as loops over positions; the targets of the regression are a tensor apart from the features put in."""
    hidden, logits = oracle.decode(weights, sizes, tokens, (roles % 2).bool(), features)
    text_sum = square_sum = 0.0
    text_count = visual_count = feature = 0
    for b in range(tokens.shape[0]):
        for s in range(tokens.shape[1]):
            role = int(roles[b, s])
            if role in (2, 3, 6, 7):
                text_sum = text_sum - torch.log_softmax(logits[b, s - 1], dim=0)[tokens[b, s]]
                text_count += 1
            if role in (4, 5, 6, 7):
                predicted = weights["project_down.weight"] @ hidden[b, s - 1]
                for e in range(features.shape[1]):
                    square_sum = square_sum + (predicted[e] - targets[feature, e]) ** 2
                visual_count += 1
            if role in (1, 3, 5, 7):
                feature += 1
    return text_sum, square_sum, text_count, visual_count


def test_losses_match_loops():
    weights, sizes, tokens, roles, features = loss_case()
    leaves = [*weights.values(), features]
    result = oracle.losses(weights, sizes, tokens, roles, features)
    text_sum, square_sum, text_count, visual_count = slow_losses(
        weights, sizes, tokens, roles, features, features.detach().clone()
    )
    assert (result["text_count"], result["visual_count"]) == (text_count, visual_count) == (7, 3)
    expected = {
        "text_sum": text_sum,
        "square_sum": square_sum,
        "text": text_sum / 7,
        "image": square_sum / (3 * 6),
    }
    for name, value in expected.items():
        assert result[name].item() == pytest.approx(value.item(), rel=EXACT), name

    # Gradients too: with targets apart, those of the features are through the input only.
    actual = torch.autograd.grad(result["text"] + result["image"], leaves)
    wanted = torch.autograd.grad(expected["text"] + expected["image"], leaves)
    for name, a, w in zip([*weights, "features"], actual, wanted, strict=True):
        assert float(w.abs().max()) > 0, name
        assert difference(a, w) < EXACT, name


def test_samples_that_share_a_sequence_do_not_see_each_other():
    """The losses and gradients of two packed sequences are those of their five parts, each a sequence of its own."""
    weights, sizes, tokens, roles, features = loss_case()
    roles[:, 0] |= START
    for b, s in ((0, 2), (1, 3), (1, 5)):
        roles[b, s] |= START
    leaves = [*weights.values(), features]
    packed = oracle.losses(weights, sizes, tokens, roles, features)
    parts = [
        oracle.losses(weights, sizes, tokens[b : b + 1, first:end], roles[b : b + 1, first:end] & ~START, of_part)
        for (b, first, end), of_part in zip(
            ((0, 0, 2), (0, 2, 8), (1, 0, 3), (1, 3, 5), (1, 5, 8)), features.split([0, 2, 2, 0, 1]), strict=True
        )
    ]
    for name in ("text_sum", "square_sum"):
        alone = sum(part[name] for part in parts)
        assert packed[name].item() == pytest.approx(alone.item(), rel=EXACT), name
        actual, wanted = (
            torch.autograd.grad(x, leaves, retain_graph=True, allow_unused=True) for x in (packed[name], alone)
        )
        for leaf, a, w in zip([*weights, "features"], actual, wanted, strict=True):
            assert (a is None) == (w is None) and (a is None or difference(a, w) < EXACT), (name, leaf)
    assert [packed["text_count"], packed["visual_count"]] == [7, 3]
    together = oracle.losses(weights, sizes, tokens, roles & ~START, features)
    assert abs(together["text_sum"].item() - packed["text_sum"].item()) > 0.01


def test_losses_of_parts_with_the_counts_of_the_whole_add_up():
    weights, sizes, tokens, roles, features = loss_case()
    whole = oracle.losses(weights, sizes, tokens, roles, features)
    parts = [
        oracle.losses(weights, sizes, tokens[b : b + 1], roles[b : b + 1], part, text_count=7, visual_count=3)
        for b, part in enumerate((features[:2], features[2:]))
    ]
    assert [part["text_count"] for part in parts] == [3, 4]
    assert [part["visual_count"] for part in parts] == [2, 1]
    for name in ("text", "image", "text_sum", "square_sum"):
        assert sum(part[name].item() for part in parts) == pytest.approx(whole[name].item(), rel=EXACT), name


def test_losses_without_targets_are_zero():
    weights, sizes, tokens, roles, features = loss_case()
    result = oracle.losses(weights, sizes, tokens, roles & VISUAL, features)
    assert (result["text_count"], result["visual_count"]) == (0, 0)
    for name in ("text", "image", "text_sum", "square_sum"):
        assert result[name].item() == 0.0
    # A zero one can call backward() on.
    gradients = torch.autograd.grad(result["text"] + result["image"], list(weights.values()))
    assert all(float(gradient.abs().max()) == 0.0 for gradient in gradients)

    result = oracle.losses(weights, sizes, tokens, roles, features, text_count=0, visual_count=0)
    assert (result["text"].item(), result["image"].item()) == (0.0, 0.0)
    assert result["text_sum"].item() > 0 and result["square_sum"].item() > 0


def test_losses_refuse_impossible_roles():
    weights, sizes, tokens, roles, features = loss_case()
    for target in (TEXT_TARGET, VISUAL | VISUAL_TARGET):
        first = roles.clone()
        first[1, 0] = target
        with pytest.raises(ValueError, match="first position"):
            oracle.losses(weights, sizes, tokens, first, features)
    first = roles.clone()
    first[0, 5] |= START
    with pytest.raises(ValueError, match="first position"):
        oracle.losses(weights, sizes, tokens, first, features)
    roles[0, 2] = VISUAL_TARGET
    with pytest.raises(ValueError, match="must be a visual row"):
        oracle.losses(weights, sizes, tokens, roles, features)


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.0, 4.0])
def test_adamw_matches_torch(clip):
    """Several steps, a learning rate for each tensor, decay on the matrix and the cube only, clipped on some steps."""
    torch.manual_seed(0)
    shapes = {"matrix": (4, 3), "vector": (5,), "cube": (1, 1, 3), "frozen": (2, 2)}
    start = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    params = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}  # leaves, as autograd needs them
    theirs = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in start.items()}
    lr = {"matrix": 0.1, "vector": 0.03, "cube": 0.02, "frozen": 0.5}
    # An eps as large as the gradients: else Adam, which forgets their scale, would hide errors in clipping.
    betas, eps, weight_decay = (0.9, 0.95), 0.5, 0.1
    optimizer = torch.optim.AdamW(
        [
            {"params": [param], "lr": lr[name], "weight_decay": 0.0 if name == "vector" else weight_decay}
            for name, param in theirs.items()
        ],
        betas=betas,
        eps=eps,
    )
    state, clipped = {}, []
    for step in range(1, 7):
        grads = {name: torch.randn_like(param) * step / 3 for name, param in params.items() if name != "frozen"}
        for name, grad in grads.items():
            theirs[name].grad = grad.clone()
        # The largest norm there is, to read the norm without clipping.
        expected = float(torch.nn.utils.clip_grad_norm_(theirs.values(), clip or math.inf))
        optimizer.step()

        before = {name: grad.clone() for name, grad in grads.items()}
        norm = oracle.adamw_step(params, grads, state, step, lr, betas, eps, weight_decay, clip)
        assert norm == pytest.approx(expected, rel=EXACT)
        assert all(torch.equal(grads[name], before[name]) for name in grads)
        for name in params:
            assert difference(params[name], theirs[name]) < EXACT, (step, name)
        clipped.append(bool(clip) and norm > clip)

    assert torch.equal(params["frozen"], start["frozen"])
    assert all(difference(params[name], start[name]) > 0.01 for name in grads)
    assert set(clipped) == ({False, True} if clip else {False})
