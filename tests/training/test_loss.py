"""The head and its loss against a dense implementation: every place of every round, one mask, no shortcuts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from phloem.training.accept import accepted
from phloem.training.checkpoints import Map
from phloem.training.data import Sample, coverage, draft_vocabulary
from phloem.training.head import Eagle3, Packed
from phloem.training.loss import Lesson, rounds, tell

VOCAB, DRAFT, SIZE = 50, 24, 16
CONFIG: dict[str, Any] = {
    "hidden_size": SIZE,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rope_theta": 100.0,
    "rms_norm_eps": 1e-5,
    "draft_vocab_size": DRAFT,
}
LENGTHS = (9, 5, 7)


@pytest.fixture
def head() -> Eagle3:
    torch.manual_seed(3)
    head = Eagle3(CONFIG, 64)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return head


class Case:
    """Random texts, and a random model: an embedding and a head."""

    def __init__(self, lengths: tuple[int, ...] = LENGTHS) -> None:
        generator = torch.Generator().manual_seed(5)
        total = sum(lengths)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.embed_VN, self.head_VN = draw(VOCAB, SIZE), draw(VOCAB, SIZE)
        self.t2d_V = torch.zeros(VOCAB, dtype=torch.bool)
        self.ids_D = torch.randperm(VOCAB, generator=generator)[:DRAFT].sort().values
        self.t2d_V[self.ids_D] = True
        ids_T = torch.randint(VOCAB, (total,), generator=generator)
        mask_T = torch.rand(total, generator=generator) < 0.7
        last_TN = draw(total, SIZE)
        logits_TV = last_TN @ self.head_VN.T
        packed = Packed(ids_T, draw(total, 3 * SIZE), lengths)
        self.lesson = Lesson(packed, mask_T, last_TN, logits_TV.argmax(-1), logits_TV.logsumexp(-1))

    def embed(self, ids: Tensor) -> Tensor:
        return self.embed_VN[ids]

    def says(self, last_nN: Tensor) -> Tensor:
        return last_nN @ self.head_VN[self.ids_D].T

    def tell(self, head: Eagle3, rounds: int) -> Any:
        return tell(head, self.lesson, self.embed, self.says, (self.ids_D, self.t2d_V), rounds, 0.8)


def brute_force_mask(length: int, round_: int) -> Tensor:
    """Which of (round_ + 1) * length columns the query of each place sees."""
    seen = torch.zeros(length, (round_ + 1) * length, dtype=torch.bool)
    for query in range(length):
        for column in range((round_ + 1) * length):
            of_round, place = divmod(column, length)
            seen[query, column] = place <= query if of_round == 0 else place == query
    return seen


def rotated(x_SHD: Tensor, places_S: Tensor) -> Tensor:
    size = x_SHD.shape[-1]
    angle_SD = places_S[:, None] / CONFIG["rope_theta"] ** (torch.arange(0, size, 2) / size)
    turn_SD = torch.polar(torch.ones_like(angle_SD), angle_SD)
    turned = torch.complex(x_SHD[..., : size // 2], x_SHD[..., size // 2 :]) * turn_SD[:, None]
    return torch.cat((turned.real, turned.imag), -1)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + CONFIG["rms_norm_eps"]).sqrt() * weight


def dense_round(p: dict[str, Tensor], embed_SN: Tensor, g_SN: Tensor, kept: list[Any], round_: int) -> Tensor:
    """One round over all places of one text; `kept` holds keys and values of the rounds before."""
    length, heads, kv_heads = len(g_SN), CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
    at = "midlayer."
    x = torch.cat((normed(embed_SN, p[at + "input_layernorm.weight"]), normed(g_SN, p[at + "hidden_norm.weight"])), -1)
    places = torch.arange(length) + round_
    q, k, v = (x @ p[f"{at}self_attn.{name}_proj.weight"].T for name in "qkv")
    q = rotated(q.view(length, heads, -1), places)
    kept.append((rotated(k.view(length, kv_heads, -1), places), v.view(length, kv_heads, -1)))
    keys, values = (torch.cat(some).repeat_interleave(heads // kv_heads, 1) for some in zip(*kept, strict=True))
    scores = torch.einsum("qhd,khd->hqk", q, keys) / math.sqrt(CONFIG["head_dim"])
    shares = scores.masked_fill(~brute_force_mask(length, round_), -torch.inf).softmax(-1)
    h = g_SN + torch.einsum("hqk,khd->qhd", shares, values).flatten(1) @ p[at + "self_attn.o_proj.weight"].T
    y = normed(h, p[at + "post_attention_layernorm.weight"])
    gate, up = (y @ p[f"{at}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return h + (F.silu(gate) * up) @ p[at + "mlp.down_proj.weight"].T


def shifted(values: Tensor, by: int) -> Tensor:
    return torch.cat((values[by:], torch.zeros_like(values[:by])))


def dense_loss(p: dict[str, Tensor], case: Case, rounds: int) -> tuple[Tensor, list[float], list[float], list[float]]:
    """As the EAGLE-3 trainer writes it: ids, targets and masks move left by one in each round."""
    lesson, begin = case.lesson, 0
    totals, right, given, counts = [torch.zeros(())] * rounds, [0.0] * rounds, [0.0] * rounds, [0] * rounds
    for length in lesson.packed.lengths:
        one = slice(begin, begin + length)
        begin += length
        logits_SV = shifted(lesson.last_TN[one] @ case.head_VN.T, 1)  # what the model says at the next place
        ids_S = shifted(lesson.packed.ids_T[one], 1)
        mask_S = lesson.mask_T[one].clone()
        mask_S[-1] = False
        taken_S = mask_S & case.t2d_V[logits_SV.argmax(-1)]
        g_SN, kept = lesson.packed.aux_TA[one] @ p["fc.weight"].T, list[Any]()
        for number in range(rounds):
            g_SN = dense_round(p, case.embed_VN[ids_S], g_SN, kept, number)
            q_SD = normed(g_SN, p["norm.weight"]) @ p["lm_head.weight"].T
            p_SD = logits_SV[:, case.ids_D].softmax(-1)
            loss_S = -(p_SD * q_SD.log_softmax(-1)).sum(-1)
            totals[number] = totals[number] + (loss_S * taken_S).sum() / sum(lesson.packed.lengths)
            hit_S = case.ids_D[q_SD.argmax(-1)] == logits_SV.argmax(-1)
            right[number] += float((hit_S & taken_S).sum())
            full_SD = logits_SV.softmax(-1)[:, case.ids_D]
            given[number] += float((torch.minimum(full_SD, q_SD.softmax(-1)).sum(-1) * taken_S).sum().detach())
            counts[number] += int(mask_S.sum())
            ids_S, mask_S, taken_S, logits_SV = (shifted(x, 1) for x in (ids_S, mask_S, taken_S, logits_SV))
    weighted = torch.stack([0.8**at * loss for at, loss in enumerate(totals)]).sum()
    shares = [[x / max(1, n) for x, n in zip(each, counts, strict=True)] for each in (right, given)]
    return weighted, [float(one.detach()) for one in totals], shares[0], shares[1]


@pytest.mark.parametrize(("lengths", "rounds"), [(LENGTHS, 1), (LENGTHS, 3), ((12,), 3), ((3, 8), 7)])
def test_loss_and_gradients_are_those_of_a_dense_implementation(
    head: Eagle3, lengths: tuple[int, ...], rounds: int
) -> None:
    case = Case(lengths)
    told = case.tell(head, rounds)
    told.loss.backward()
    p = {name: value.detach().clone().requires_grad_() for name, value in head.named_parameters()}
    loss, losses, accuracies, acceptances = dense_loss(p, case, rounds)
    loss.backward()
    assert float(loss.detach()) > 0.1
    torch.testing.assert_close(told.loss, loss, rtol=1e-5, atol=1e-6)
    assert told.losses == pytest.approx(losses, rel=1e-5, abs=1e-6)
    assert told.accuracies == pytest.approx(accuracies) and told.acceptances == pytest.approx(acceptances, rel=1e-5)
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(
            parameter.grad, p[name].grad, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_round_sees_what_the_brute_force_mask_says(head: Eagle3) -> None:
    """Which tokens and states each result depends on, by its gradient, in texts that stand beside others."""
    case = Case((4, 8))
    packed = case.lesson.packed
    embeds_TN = case.embed_VN[packed.ids_T].requires_grad_()
    packed.aux_TA.requires_grad_()
    at_n = torch.arange(4, 9)  # places 0 to 4 of the second text

    def ids(number: int, rows: Tensor) -> Tensor:
        return (rows + 1 + number).clamp(max=11)  # `embed` takes places for ids

    for number, out_nN in enumerate(head.unroll(packed, lambda at: embeds_TN[at], [at_n] * 3, ids)):
        seen = brute_force_mask(8, number)
        for place in range(5):
            grads = torch.autograd.grad(out_nN[place].sum(), (embeds_TN, packed.aux_TA), retain_graph=True)
            columns = [divmod(int(column), 8) for column in seen[place].nonzero()]
            tokens = {4 + u + 1 + of_round for of_round, u in columns if 4 + u + 1 + of_round < 12}
            assert set(grads[0].abs().sum(-1).nonzero().flatten().tolist()) == tokens
            states = {4 + u for of_round, u in columns if of_round == 0}
            assert set(grads[1].abs().sum(-1).nonzero().flatten().tolist()) == states


def test_a_text_learns_nothing_from_its_neighbours(head: Eagle3) -> None:
    whole, parts = Case().tell(head, 3).losses, [0.0] * 3
    begin, lesson = 0, Case().lesson
    for length in LENGTHS:
        one = slice(begin, begin + length)
        begin += length
        case = Case()
        case.lesson = Lesson(
            Packed(lesson.packed.ids_T[one], lesson.packed.aux_TA[one], (length,)),
            *(x[one] for x in (lesson.mask_T, lesson.last_TN, lesson.best_T, lesson.sum_T)),
        )
        parts = [a + b * length for a, b in zip(parts, case.tell(head, 3).losses, strict=True)]
    assert [x / sum(LENGTHS) for x in parts] == pytest.approx(whole, rel=1e-5)


def test_nothing_to_learn_is_no_loss_and_no_gradient(head: Eagle3) -> None:
    case = Case()
    case.lesson.mask_T[:] = False
    told = case.tell(head, 3)
    assert told.value == 0 and told.accuracies == [0, 0, 0] and told.places == 0
    rows, learned, counted = rounds(case.lesson, case.t2d_V, 3)
    assert [len(x) for x in rows] == [len(x) for x in learned] == counted == [0, 0, 0]


def step_by_step(head: Eagle3, case: Case, text: slice, prompt: int, most: int) -> list[int]:
    """Drafts accepted in each step of decoding this answer, one token and one draft after the other."""
    p: dict[str, Tensor] = {name: value.detach() for name, value in head.named_parameters()}
    ids = case.lesson.packed.ids_T[text]
    g_SN = case.lesson.packed.aux_TA[text] @ p["fc.weight"].T
    known, accepted_in = prompt, list[int]()  # `known`: the place of the last token
    while known + 1 < len(ids):
        drafts = list[int]()
        for _ in range(most):
            # A draft is what the last place says, when every place before it is gone through in its round.
            carried, kept = g_SN[:known], list[Any]()
            for number in range(len(drafts) + 1):
                tokens = torch.cat((ids[: known + 1], torch.tensor(drafts, dtype=torch.int64)))
                tokens = tokens[1 + number : 1 + number + known]
                carried = dense_round(p, case.embed_VN[tokens], carried, kept, number)
            best = int((normed(carried[-1], p["norm.weight"]) @ p["lm_head.weight"].T).argmax())
            drafts.append(int(case.ids_D[best]))
        room = len(ids) - known - 2
        agrees = [draft == int(token) for draft, token in zip(drafts[:room], ids[known + 1 :], strict=False)]
        right = next((at for at, same in enumerate(agrees) if not same), len(agrees))
        accepted_in.append(right)
        known += right + 1
    return accepted_in


@torch.no_grad()
def test_accepted_drafts_are_those_of_decoding_step_by_step(head: Eagle3) -> None:
    case = Case((14, 9))
    packed, prompts = case.lesson.packed, [3, 1]
    # A text that the head mostly says itself: each token behind the prompt is what it drafts there, or another.
    for _ in range(14):
        at_T = torch.arange(len(packed.ids_T))

        def ids(number: int, rows: Tensor) -> Tensor:
            del number
            return packed.ids_T[(rows + 1).clamp(max=22)]

        (out,) = head.unroll(packed, case.embed, [at_T], ids)
        said = case.ids_D[head.logits(out).argmax(-1)]
        for place in range(2, 23):
            if place % 4 and place not in (14, 15):
                packed.ids_T[place] = said[place - 2]
    found = accepted(head, packed, prompts, case.embed, case.ids_D, 3)
    by_hand = [
        right
        for text, prompt in ((slice(0, 14), 3), (slice(14, 23), 1))
        for right in step_by_step(head, case, text, prompt, 3)
    ]
    assert sum(by_hand) >= 4, "a text that shows nothing"
    assert found.steps == len(by_hand) and found.tokens == sum(by_hand) + len(by_hand) == 23 - 4 - 2
    assert found.drafts == {right: by_hand.count(right) for right in set(by_hand)}
    assert found.length == pytest.approx(17 / len(by_hand))


def test_the_vocabulary_has_the_most_frequent_tokens_of_what_was_said() -> None:
    samples = [
        Sample((7, 7, 7, 9, 9, 3, 4), (False, True, True, True, True, True, False)),
        Sample((4, 4), (True, False)),
    ]
    d2t_D, t2d_V = draft_vocabulary(samples, 3, 12)
    covered = coverage(samples, t2d_V)
    words = Map(d2t_D, t2d_V)
    assert covered == pytest.approx(5 / 6)
    assert words.ids_D.tolist() == [3, 7, 9]  # of 3 and 4, equally frequent, the smaller
    assert d2t_D.tolist() == [3, 6, 7] and t2d_V.nonzero().flatten().tolist() == [3, 7, 9]
    d2t_D, t2d_V = draft_vocabulary(samples, 6, 12)
    covered = coverage(samples, t2d_V)
    assert Map(d2t_D, t2d_V).ids_D.tolist() == [0, 1, 3, 4, 7, 9] and covered == 1  # filled up with unused ids
    assert draft_vocabulary(samples, 100, 12)[0].tolist() == [0] * 12
