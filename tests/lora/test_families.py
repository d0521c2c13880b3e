"""Families of models from tiny configurations, each with rows of its own: the directions of what plain calls bring."""

import peft
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from eva_lora import EvaConfig, collect
from eva_lora.collecting.rows import FITS_NO_MASK
from support.models import LINEARS
from support.peft_kinds import STACKED_EXPERTS
from support.plain_calls import initialised, recorded, require_directions_of
from support.versions import needs

pytestmark = pytest.mark.filterwarnings("ignore:EVA stopped at")

CONFIG = EvaConfig(max_batches=4, tau=1.0)
SIZES = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}  # fmt: skip


@needs("transformers>=4.52")  # its parts have other names before
def test_a_vision_language_model_masks_its_text_and_names_its_images():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=8, **sizes), image_token_id=59,
        text_config=LlamaConfig(vocab_size=60, num_key_value_heads=2, **sizes),
        vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    model = peft.get_peft_model(
        LlavaForConditionalGeneration(config), peft.LoraConfig(r=2, target_modules="all-linear")
    )
    generator, loader = torch.Generator().manual_seed(0), []
    for _ in range(4):
        ids = torch.randint(0, 58, (3, 12), generator=generator)
        ids[:, 1:5] = 59
        keep = torch.arange(12).expand(3, 12) < torch.tensor([12, 9, 7])[:, None]
        pixels = torch.randn(3, 3, 16, 16, generator=generator)
        loader.append({"input_ids": ids, "attention_mask": keep.long(), "pixel_values": pixels})
    with pytest.warns(UserWarning, match=r"^the inputs of 14 layers, the first is model\.vision_tower\."):
        statistics = collect(model, loader, CONFIG, progress=False)
    for site in statistics.sites:
        rows = statistics.inputs[site.input].num_rows
        if site.name.startswith("model.language_model"):
            assert (site.rows, rows) == ("attention_mask", 4 * (12 + 9 + 7))
        else:
            assert site.rows == FITS_NO_MASK
            assert rows == 4 * 3 * (4 if "projector" in site.name else 5)  # patches, and a class token in the tower


def whisper(lengths):
    """The encoder has 10 rows; transcripts are as long as ``lengths`` says."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=40, num_mel_bins=6, max_source_positions=10, max_target_positions=12, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=3, **SIZES,
    )  # fmt: skip
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    base = WhisperForConditionalGeneration(config)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets))
    generator, batches = torch.Generator().manual_seed(0), []
    for length in lengths:
        labels = torch.randint(4, 40, (3, length), generator=generator)
        labels[1, 3:] = -100
        batches.append({"input_features": torch.randn(3, 6, 20, generator=generator), "labels": labels})
    return model, batches


@pytest.mark.parametrize("lengths", [[6, 10, 7], [10, 10]], ids=str)  # 10: as long as the sound
def test_whisper_masks_its_transcripts_and_counts_all_of_its_sound(lengths):
    model, batches = whisper(lengths)
    calls = recorded(model, batches)
    initialised(model, batches)

    def kept(name, number, x):
        of_sound = ".encoder." in name or "encoder_attn.k_proj" in name or "encoder_attn.v_proj" in name
        return None if of_sound else batches[number]["labels"] != -100

    require_directions_of(model, calls, kept)


def wav2vec2(samples, **options):
    """Models of sound, padded with silence, and how many of the frames count in each batch."""
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, feat_extract_norm="layer", mask_time_prob=0.0, **options,
    )  # fmt: skip
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense"]
    model = peft.get_peft_model(Wav2Vec2ForCTC(config), peft.LoraConfig(r=2, target_modules=targets))
    generator, batches = torch.Generator().manual_seed(0), []
    for length in samples:
        mask = torch.arange(length) < torch.tensor([length, length - 90, length - 30])[:, None]
        mask |= torch.tensor(length % 40 == 0)  # without padding
        labels = torch.randint(1, 20, (3, 4), generator=generator)
        labels[2, 2:] = -100
        values = torch.randn(3, length, generator=generator) * mask
        batches.append({"input_values": values, "attention_mask": mask.long(), "labels": labels})
    return model, batches


def frames_of(batch):  # kernels of 10 and 3 samples, in steps of 5 and 2
    lengths = ((batch["attention_mask"].sum(1) - 10) // 5 + 1 - 3) // 2 + 1
    return torch.arange(int(lengths.max())) < lengths[:, None]


@pytest.mark.parametrize("samples", [(210, 250, 170), (200, 250, 170)], ids=["padded", "a first batch without padding"])
def test_wav2vec2_whose_mask_is_of_samples_masks_its_frames(samples):
    model, batches = wav2vec2(samples)
    calls = recorded(model, batches)
    report = initialised(model, batches)
    assert {state["rows"] for state in report.statistic.values()} == {"attention_mask"}
    require_directions_of(model, calls, lambda name, number, x: frames_of(batches[number]))


def test_wav2vec2_with_frames_of_two_kinds_counts_all_of_them_and_says_so():
    model, batches = wav2vec2((210, 250, 170), add_adapter=True, output_hidden_size=16)
    calls = recorded(model, batches)
    with pytest.warns(UserWarning, match=r"^the inputs of 12 layers, the first is .*, have rows that fit no mask"):
        report = initialised(model, batches)
    assert {state["rows"] for state in report.statistic.values()} == {FITS_NO_MASK}
    require_directions_of(model, calls)


@needs("transformers>=4.52")  # its parts have other names before
def test_clip_masks_its_texts_and_counts_all_of_its_images():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={"vocab_size": 60, "max_position_embeddings": 16, "eos_token_id": 2, **sizes},
        vision_config={"image_size": 16, "patch_size": 8, **sizes}, projection_dim=8,
    )  # fmt: skip
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    model = peft.get_peft_model(CLIPModel(config), peft.LoraConfig(r=2, target_modules=targets))
    generator, batches = torch.Generator().manual_seed(0), []
    for length in (8, 5, 6):  # the second as long as an image: four patches and the class token
        ids = torch.randint(3, 58, (3, length), generator=generator)
        keep = torch.arange(length) < torch.tensor([length, 4, 3])[:, None]
        pixels = torch.randn(3, 3, 16, 16, generator=generator)
        batches.append({"input_ids": ids, "attention_mask": keep.long(), "pixel_values": pixels})
    calls = recorded(model, batches)
    with pytest.warns(UserWarning, match=r"^the inputs of 6 layers, the first is vision_model"):
        initialised(model, batches)
    masks = [batch["attention_mask"].bool() for batch in batches]
    require_directions_of(model, calls, lambda name, number, x: masks[number] if "text" in name else None)


def test_a_sentence_encoder_masks_its_tokens():
    class Sentences(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
            self.bert, self.head = BertModel(BertConfig(vocab_size=60, **sizes), False), nn.Linear(16, 16)

        def forward(self, attention_mask, **tokens):
            hidden = self.bert(attention_mask=attention_mask, **tokens).last_hidden_state
            weights = attention_mask[..., None] / attention_mask.sum(1)[:, None, None]
            return self.head((hidden * weights).sum(1))

    targets = ["query", "key", "value", "dense", "head"]
    model = peft.get_peft_model(Sentences(), peft.LoraConfig(r=2, target_modules=targets))
    generator, batches = torch.Generator().manual_seed(0), []
    for length in (9, 6, 7):  # the second has as many sequences as tokens
        ids = torch.randint(0, 60, (6, length), generator=generator)
        keep = torch.arange(length) < torch.randint(1, length + 1, (6, 1), generator=generator)
        batches.append({"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": keep.long()})
    calls = recorded(model, batches)
    report = initialised(model, batches)
    assert {state["rows"] for state in report.statistic.values()} == {"attention_mask"}
    masks = [batch["attention_mask"].bool() for batch in batches]
    require_directions_of(model, calls, lambda name, number, x: masks[number] if x.ndim == 3 else None)


@needs("transformers>=4.56")  # has it first
@pytest.mark.parametrize("fed", ["labels", "decoder_input_ids"])
def test_florence_2_masks_its_two_sides_and_counts_all_of_its_images(fed):
    from transformers import Florence2Config, Florence2ForConditionalGeneration

    torch.manual_seed(0)
    config = Florence2Config(
        text_config={"model_type": "bart", "vocab_size": 60, "max_position_embeddings": 32, **SIZES},
        vision_config={
            "embed_dim": (8, 8), "num_heads": (2, 2), "num_groups": (2, 2), "depths": (1, 1), "patch_size": (7, 3),
            "patch_stride": (4, 2), "patch_padding": (3, 1), "patch_prenorm": (False, True), "window_size": 2,
            "projection_dim": 16, "max_temporal_embeddings": 4, "max_position_embeddings": 8,
        },
        image_token_id=59,
    )  # fmt: skip
    base = Florence2ForConditionalGeneration(config)
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "qkv"]
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets))
    generator, batches = torch.Generator().manual_seed(0), []
    for prompt, answer in ((9, 6), (7, 7), (8, 5)):
        ids = torch.randint(3, 58, (3, prompt), generator=generator)
        ids[:, :5] = 59
        keep = torch.arange(prompt) < torch.tensor([prompt, 6, 7])[:, None]
        labels = torch.randint(3, 58, (3, answer), generator=generator)
        labels[1, 2:] = -100
        pixels = torch.randn(3, 3, 16, 16, generator=generator)
        batch = {"input_ids": ids, "attention_mask": keep.long(), "pixel_values": pixels}
        batches.append({**batch, "labels": labels})
        if fed == "decoder_input_ids":
            batches[-1][fed] = labels.clamp(min=0)
    calls = recorded(model, batches)
    with pytest.warns(UserWarning, match=r"have rows that fit no mask of the batch"):
        report = initialised(model, batches)

    def kept(name, number, x):
        if "language_model" not in name:
            assert report.statistic[name]["rows"] == FITS_NO_MASK
            return None
        of_prompt = ".encoder." in name or "encoder_attn.k_proj" in name or "encoder_attn.v_proj" in name
        return batches[number]["attention_mask"].bool() if of_prompt else batches[number]["labels"] != -100

    require_directions_of(model, calls, kept)


def texts(lengths, seed=0, vocab=58):
    """Three sequences each, padded to such a length, and which of their tokens count."""
    generator, batches = torch.Generator().manual_seed(seed), []
    for length in lengths:
        keep = torch.arange(length) < torch.tensor([length, 4, 3])[:, None]
        ids = torch.randint(3, vocab, (3, length), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": keep.long()})
    return batches, [batch["attention_mask"].bool() for batch in batches]


SMALL = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2}
DECODER = {**SMALL, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}


def test_mamba_masks_its_tokens():
    torch.manual_seed(0)
    base = MambaForCausalLM(MambaConfig(state_size=4, **SMALL))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["in_proj", "x_proj"]))
    batches, masks = texts((8, 5, 6))
    calls = recorded(model, batches)
    report = initialised(model, batches)
    assert {state["rows"] for state in report.statistic.values()} == {"attention_mask"}
    require_directions_of(model, calls, lambda name, number, x: masks[number])


@needs(STACKED_EXPERTS)
def test_a_mixture_of_experts_masks_its_tokens_flattened_and_routed():
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, shared_expert_intermediate_size=20, **DECODER
    )
    targets, parameters = [*LINEARS, "shared_expert_gate"], ["experts.gate_up_proj", "experts.down_proj"]
    lora = peft.LoraConfig(r=2, target_modules=targets, target_parameters=parameters)
    model = peft.get_peft_model(Qwen2MoeForCausalLM(config), lora)
    batches, masks = texts((8, 5, 6))
    calls = {name: made for name, made in recorded(model, batches).items() if "experts" not in name}
    report = initialised(model, batches)
    assert {state["rows"] for state in report.statistic.values()} == {"attention_mask"}
    require_directions_of(model, calls, lambda name, number, x: masks[number].view(x.shape[:-1]))
    routed = [state["expert_rows"] for name, state in report.statistic.items() if "experts" in name]
    assert len(routed) == 4
    assert {sum(rows) for rows in routed} == {2 * sum(int(mask.sum()) for mask in masks)}


class ForTwoTokens(LlamaForCausalLM):
    """Predicts the next token, and in a block behind the head the one after it."""

    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        self.merge, self.block = nn.Linear(2 * width, width), nn.Linear(width, width)

    def forward(self, input_ids, attention_mask, **options):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.lm_head(hidden)
        following = self.get_input_embeddings()(input_ids.roll(-1, 1))
        merged = self.merge(torch.cat([hidden, following], -1))
        return logits, self.lm_head(merged + torch.tanh(self.block(merged)))


@pytest.mark.parametrize("head", [[], ["lm_head"]], ids=["", "and the head"])
def test_a_block_for_the_token_after_the_next_sees_all_of_its_tokens(head):
    torch.manual_seed(0)
    targets = [*LINEARS, "merge", "block", *head]
    model = peft.get_peft_model(ForTwoTokens(LlamaConfig(**DECODER)), peft.LoraConfig(r=2, target_modules=targets))
    batches, masks = texts((8, 5, 6, 7, 9))
    calls = recorded(model, batches)
    report = initialised(model, batches)
    assert {state["rows"] for state in report.statistic.values()} == {"attention_mask"}
    require_directions_of(model, calls, lambda name, number, x: masks[number])


@needs("transformers>=5")  # older ones have it, with other options
@pytest.mark.parametrize("lengths", [[(8, 6), (5, 7)], [(6, 6), (5, 7)]], ids=["", "both sides of one length at first"])
def test_t5gemma_masks_its_two_sides(lengths):
    from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration, T5GemmaModuleConfig

    torch.manual_seed(0)
    side = T5GemmaModuleConfig(head_dim=8, **DECODER).to_dict()
    config = T5GemmaConfig(encoder=side, decoder=side, vocab_size=60, pad_token_id=0, bos_token_id=2)
    model = peft.get_peft_model(T5GemmaForConditionalGeneration(config), peft.LoraConfig(r=2, target_modules=LINEARS))
    batches, masks = texts([prompt for prompt, _ in lengths])
    generator = torch.Generator().manual_seed(1)
    for batch, (_, answer) in zip(batches, lengths, strict=True):
        batch["labels"] = torch.randint(3, 58, (3, answer), generator=generator)
        batch["labels"][1, 2:] = -100
    calls = recorded(model, batches)
    report = initialised(model, batches)
    assert {state["rows"] for state in report.statistic.values()} == {"attention_mask", "labels"}

    def kept(name, number, x):
        of_prompt = ".encoder." in name or "cross_attn.k_proj" in name or "cross_attn.v_proj" in name
        return masks[number] if of_prompt else batches[number]["labels"] != -100

    require_directions_of(model, calls, kept)


@needs("transformers>=5")  # older ones have it, with other options
def test_csm_masks_its_backbone_and_counts_all_frames_that_its_depth_decoder_sees():
    from transformers import CsmConfig, CsmForConditionalGeneration

    torch.manual_seed(0)
    shared = {"num_codebooks": 4, "vocab_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    depth = {**shared, "backbone_hidden_size": 16, "hidden_size": 12, "intermediate_size": 16,
             "num_key_value_heads": 1, "max_position_embeddings": 8}  # fmt: skip
    codec = {
        "model_type": "mimi", "hidden_size": 8, "num_filters": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 8, "codebook_size": 16, "codebook_dim": 4,
        "vector_quantization_hidden_dimension": 4, "upsample_groups": 8, "num_quantizers": 4,
        "num_semantic_quantizers": 1, "upsampling_ratios": [2, 2],
    }  # fmt: skip
    config = CsmConfig(
        **shared, text_vocab_size=60, hidden_size=16, intermediate_size=24, num_key_value_heads=1, codec_config=codec,
        depth_decoder_config=depth, audio_token_id=58, audio_eos_token_id=59, codebook_pad_token_id=19,
    )  # fmt: skip
    targets = r"(backbone_model|depth_decoder)\..*_proj"
    model = peft.get_peft_model(CsmForConditionalGeneration(config), peft.LoraConfig(r=2, target_modules=targets))
    generator, batches = torch.Generator().manual_seed(0), []
    for length in (8, 5, 6):
        codes = torch.randint(1, 18, (3, length, 4), generator=generator)
        keep = torch.arange(length) < torch.tensor([length, 4, 3])[:, None]
        labels = codes.masked_fill(~keep[..., None], -100)
        labels[:, :2] = -100
        batches.append({"input_ids": codes, "attention_mask": keep.long(), "labels": labels})
    calls = recorded(model, batches)
    assert calls["depth_decoder.model.layers.0.mlp.up_proj"]
    with pytest.warns(UserWarning, match=r"^the inputs of 7 layers, the first is depth_decoder\..* fit no mask"):
        initialised(model, batches)
    masks = [batch["attention_mask"].bool() for batch in batches]
    require_directions_of(model, calls, lambda name, number, x: masks[number] if "backbone" in name else None)


def diffusion_batches(**more):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "hidden_states": torch.randn(3, 4, 8, 8, generator=generator),
            "encoder_hidden_states": torch.randn(3, 5, 12, generator=generator),
            "timestep": torch.randint(0, 1000, (3,), generator=generator),
            **{name: make(generator) for name, make in more.items()},
        }
        for _ in range(4)
    ]


TRANSFORMER = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "attention_head_dim": 8, "num_attention_heads": 2}


@needs("diffusers>=0.30")
def test_a_diffusion_transformer_counts_its_patches_its_texts_and_its_steps():
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    base = SD3Transformer2DModel(
        num_layers=2, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
        pos_embed_max_size=8, **TRANSFORMER,
    )  # fmt: skip
    targets = ["to_q", "add_k_proj", "to_out.0", "to_add_out", "proj", "net.2", "norm1.linear", "context_embedder"]
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets, exclude_modules=["pos_embed.proj"]))
    batches = diffusion_batches(pooled_projections=lambda generator: torch.randn(3, 10, generator=generator))
    calls = recorded(model, batches)
    report = initialised(model, batches)
    assert {state["rows"] for state in report.statistic.values()} == {"all rows"}
    require_directions_of(model, calls)


@needs("diffusers>=0.30")
def test_a_diffusion_transformer_with_a_mask_of_a_name_of_its_own_counts_all_of_its_rows_and_says_so():
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    base = PixArtTransformer2DModel(
        num_layers=1, cross_attention_dim=16, caption_channels=12, norm_num_groups=1, out_channels=8,
        use_additional_conditions=False, **TRANSFORMER,
    )  # fmt: skip
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_out.0", "net.2"]))
    keep = torch.arange(5) < torch.tensor([5, 2, 4])[:, None]
    batches = diffusion_batches(
        encoder_attention_mask=lambda generator: keep.float(),
        added_cond_kwargs=lambda generator: {"resolution": None, "aspect_ratio": None},
    )
    calls = recorded(model, batches)
    with pytest.warns(UserWarning, match=r"^all rows counted, .* what is meant by encoder_attention_mask"):
        initialised(model, batches)
    require_directions_of(model, calls)


class TokensFirst(nn.Module):
    """A block as open_clip's text tower has them: (tokens, batch, d), a causal mask of its own, no other mask."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.first, self.second = nn.Embedding(60, 16), nn.LayerNorm(16), nn.LayerNorm(16)
        self.attn = nn.MultiheadAttention(16, 2)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(16, 24))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(24, 16))

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids).permute(1, 0, 2)
        causal = torch.full((len(x), len(x)), -torch.inf).triu(1)
        y = self.first(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=causal)[0]
        x = x + self.mlp(self.second(x))
        return x.permute(1, 0, 2)


def heads_of(attention, x):  # (tokens, batch, d) -> (tokens, batch, d), what the output projection is fed
    weight, bias = attention.in_proj_weight.detach(), attention.in_proj_bias.detach()
    pairs = zip(weight.chunk(3), bias.chunk(3), strict=True)
    q, k, v = ((x @ w.T + b).unflatten(-1, (2, 8)).permute(1, 2, 0, 3) for w, b in pairs)
    causal = torch.full((len(x), len(x)), -torch.inf).triu(1)
    return (torch.softmax(q @ k.mT / 8**0.5 + causal, -1) @ v).permute(2, 0, 1, 3).flatten(2)


@pytest.mark.parametrize("masked", [False, True], ids=["as open_clip calls it", "with a mask beside"])
@pytest.mark.parametrize("lengths", [(8, 5, 6), (5, 3, 6)], ids=str)
def test_the_layout_of_open_clip_is_read_as_it_lies(masked, lengths):
    model = peft.get_peft_model(TokensFirst(), peft.LoraConfig(r=2, target_modules=["attn", "c_fc", "c_proj"]))
    batches, masks = texts(lengths)
    for batch in batches if not masked else []:
        del batch["attention_mask"]
    calls = recorded(model, batches)
    attention = model.get_base_model().attn.base_layer
    calls["attn.base_layer.out_proj"] = [(number, heads_of(attention, x)) for number, x in calls["attn"]]
    initialised(model, batches)
    require_directions_of(model, calls, lambda name, number, x: masks[number].T if masked else None)
