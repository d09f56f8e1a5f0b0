"""Greedy decoding and likelihoods behind prefixes whose keys and values are shared.

B batch, P tokens of a prefix, L padded length of the questions, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration


class Prefixes:
    """Keys and values of several prefixes of one length, a row for each."""

    def __init__(self, cache: Any, length: int) -> None:
        self._cache = cache
        self.length = length

    def select(self, rows: Sequence[int]) -> Any:
        """A cache of its own with these rows, in this order; a row may come several times."""
        cache = copy.copy(self._cache)
        cache.layers = [copy.copy(layer) for layer in self._cache.layers]
        if self.length:
            device = next(layer.keys.device for layer in cache.layers)
            cache.batch_select_indices(torch.tensor(rows, device=device))
        return cache

    @staticmethod
    def join(parts: Sequence[Prefixes]) -> Prefixes:
        """The rows of all parts, which have one length."""
        if len(parts) == 1:
            return parts[0]
        joined = copy.copy(parts[0]._cache)
        joined.layers = [copy.copy(layer) for layer in joined.layers]
        for number, layer in enumerate(joined.layers):
            layers = [part._cache.layers[number] for part in parts]
            layer.keys = torch.cat([one.keys for one in layers])
            layer.values = torch.cat([one.values for one in layers])
        return Prefixes(joined, parts[0].length)


def cache_argument(model: Any) -> str:
    """What ``forward`` calls the KV cache, which was renamed within transformers 5."""
    takes = inspect.signature(model.forward).parameters
    return "cache" if "cache" in takes else "past_key_values"


class Decoder:
    """Continues prompts with a model's language model.

    Args:
        model: Any LLaVA model.
        end_ids: Tokens that end an answer.
        max_new_tokens: Longest answer.
    """

    def __init__(
        self, model: LlavaForConditionalGeneration, end_ids: list[int], max_new_tokens: int
    ) -> None:
        self._language_model: Any = model.model.language_model
        self._cache_argument = cache_argument(self._language_model)
        self._head = model.lm_head
        self._embed = model.get_input_embeddings()
        self._device = model.device
        self._end_ids = torch.tensor(end_ids, device=self._device)
        self._max_new_tokens = max_new_tokens

    def prefix(self, ids: list[int]) -> Prefixes:
        """One prefix of plain text."""
        cache = DynamicCache(config=self._language_model.config)
        if ids:
            embeds = self._embed(torch.tensor([ids], device=self._device))  # (1, P, D)
            self._forward(embeds, cache)
        return Prefixes(cache, len(ids))

    def extend(self, shared: Prefixes, features: Tensor) -> Prefixes:
        """The shared prefix continued by each of ``features`` ``(B, N, D)``."""
        cache = shared.select([0] * len(features))
        self._forward(features, cache)
        return Prefixes(cache, shared.length + features.shape[1])

    def generate(
        self, prefixes: Prefixes, rows: Sequence[int], questions: list[list[int]]
    ) -> list[tuple[list[int], bool]]:
        """Continue each ``prefix + question`` greedily.

        Args:
            prefixes: What stands before the questions.
            rows: Of each question, its prefix.
            questions: B lists of token ids.

        Returns:
            B lists of new token ids without the end of turn, and whether there was one.
        """
        cache, logits, mask, positions = self._read(prefixes, rows, questions)
        answers: list[list[int]] = [[] for _ in questions]
        finished = [False] * len(questions)
        running = list(range(len(questions)))  # question of each row that is still decoded
        for step in range(self._max_new_tokens + 1):
            token = logits.argmax(-1)  # (B,)
            ended = torch.isin(token, self._end_ids).tolist()
            for row, (question, new) in enumerate(zip(running, token.tolist(), strict=True)):
                finished[question] |= ended[row]
                if not finished[question] and step < self._max_new_tokens:
                    answers[question].append(new)
            goes_on = [row for row, question in enumerate(running) if not finished[question]]
            if not goes_on or step == self._max_new_tokens:
                break
            if len(goes_on) <= len(running) // 2:  # a smaller batch is worth copying the cache
                kept = torch.tensor(goes_on, device=self._device)
                cache.batch_select_indices(kept)
                token, mask, positions = token[kept], mask[kept], positions[kept]
                running = [running[row] for row in goes_on]
            mask = torch.cat([mask, mask.new_ones(len(running), 1)], 1)
            positions = positions[:, -1:] + 1
            logits = self._step(self._embed(token).unsqueeze(1), cache, mask, positions)[:, -1]
        return list(zip(answers, finished, strict=True))

    def log_likelihoods(
        self,
        prefixes: Prefixes,
        rows: Sequence[int],
        questions: list[list[int]],
        candidates: list[list[list[int]]],
    ) -> list[list[tuple[float, bool]]]:
        """``log p(candidate | prefix + question)`` of every candidate of every question.

        Beside it, whether greedy decoding would begin with the candidate.

        Args:
            prefixes: What stands before the questions.
            rows: Of each question, its prefix.
            questions: B lists of token ids.
            candidates: For each question, lists of token ids, none of them empty.
        """
        cache, logits, mask, positions = self._read(prefixes, rows, questions)
        first = logits.float().log_softmax(-1)  # (B, V)
        greedy = first.argmax(-1).tolist()
        totals = [
            [
                (float(first[row, candidate[0]]), greedy[row] == candidate[0])
                for candidate in of_question
            ]
            for row, of_question in enumerate(candidates)
        ]
        longer = [
            (row, number)
            for row, of_question in enumerate(candidates)
            for number, candidate in enumerate(of_question)
            if len(candidate) > 1
        ]
        for start in range(0, len(longer), len(questions)):
            some = longer[start : start + len(questions)]
            texts = [candidates[row][number] for row, number in some]
            of_question = torch.tensor([row for row, _ in some], device=self._device)
            rest = self._rest(cache, mask[of_question], positions[of_question], of_question, texts)
            for (row, number), (value, is_greedy) in zip(some, rest, strict=True):
                begun, was_greedy = totals[row][number]
                totals[row][number] = begun + value, was_greedy and is_greedy
        return totals

    def _rest(
        self, cache: Any, mask: Tensor, positions: Tensor, rows: Tensor, texts: list[list[int]]
    ) -> list[tuple[float, bool]]:
        """Of the texts' tokens from the second on, padded on the right."""
        longest = max(map(len, texts))
        ids = torch.zeros(len(texts), longest, dtype=torch.long, device=self._device)
        counts = torch.zeros(len(texts), longest - 1, device=self._device)
        for number, text in enumerate(texts):
            ids[number, : len(text)] = torch.tensor(text, device=self._device)
            counts[number, : len(text) - 1] = 1
        own = Prefixes(cache, 1).select(rows.tolist())
        steps = torch.arange(1, longest, device=self._device)
        mask = torch.cat([mask, mask.new_ones(len(texts), longest - 1)], 1)
        logits = self._step(self._embed(ids[:, :-1]), own, mask, positions[:, -1:] + steps)
        log_probs = logits.float().log_softmax(-1)  # (B, longest - 1, V)
        chosen = log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1)
        differs = (log_probs.argmax(-1) != ids[:, 1:]) & (counts > 0)
        return list(
            zip((chosen * counts).sum(1).tolist(), (~differs.any(1)).tolist(), strict=True)
        )

    def _read(
        self, prefixes: Prefixes, rows: Sequence[int], questions: list[list[int]]
    ) -> tuple[Any, Tensor, Tensor, Tensor]:
        """Run the questions through the model.

        Returns:
            The cache, logits of the next token ``(B, V)``, mask ``(B, P + L)`` and positions
            ``(B, L)``.
        """
        longest = max(map(len, questions))
        ids = torch.zeros(len(questions), longest, dtype=torch.long)
        mask = torch.ones(len(questions), prefixes.length + longest, dtype=torch.long)
        for row, question in enumerate(questions):
            padding = longest - len(question)
            ids[row, padding:] = torch.tensor(question)
            mask[row, prefixes.length : prefixes.length + padding] = 0
        ids, mask = ids.to(self._device), mask.to(self._device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, prefixes.length :]
        cache = prefixes.select(rows)
        hidden = self._forward(self._embed(ids), cache, mask, positions)
        return cache, self._head(hidden[:, -1]), mask, positions

    def _step(self, embeds: Tensor, cache: Any, mask: Tensor, positions: Tensor) -> Tensor:
        logits: Tensor = self._head(self._forward(embeds, cache, mask, positions))
        return logits

    def _forward(
        self,
        embeds: Tensor,
        cache: Any,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """``(B, L, D)`` hidden states; the cache grows by L."""
        hidden: Tensor = self._language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{self._cache_argument: cache},
        ).last_hidden_state
        return hidden
