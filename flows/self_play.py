"""Flow - self-play: improve a policy by preferring its own better completions, `iterations` times.

prompts -> sample -> score -> weigh -> train -> evaluate, and the checkpoint is the next policy

A warm start trains the start model on given responses before that.

Each method of `SelfPlay` makes one thing from finished artifacts; `play` is the order. What is built, found or only
looked at is the hands' matter (flows/hands.py). How a run starts and what it leaves behind is in flows/run.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_contracts.artifact import ArtifactRef
from data_contracts.checkpoint import ModelRef
from data_contracts.config import Config
from data_contracts.errors import TransientError
from data_contracts.store import Store, content_digest
from flows.config import RunConfig
from flows.gate import Gate
from flows.hands import Hands, Listener
from flows.preflight import Checked
from flows.tournament import scoring_of, spread
from stages.evaluation.promotion import Measurement, select_checkpoint
from stages.scoring.pairing import PAIRINGS
from stages.stage import EARLIER, STAGES
from stages.training.batches import STEPS
from stages.training.config import TrainingConfig
from stages.weighting.stage import WeightingConfig
from tasks.build import Built
from tasks.models import resolve
from tasks.place import Place, Purpose
from tasks.prompts import part_of

MOST_ITERATIONS = 8
"""At most this many iterations (evenly spaced) enter the tournament; its cost is quadratic."""


class SelfPlay:
    """One run of self-play. Between its steps travel references to finished artifacts and nothing else."""

    def __init__(
        self,
        config: RunConfig,
        checked: Checked,
        start: ArtifactRef,
        models: dict[str, ArtifactRef],
        hands: Hands,
        listener: Listener,
    ):
        """`start`: the model that the user gave as `policy`; `models`: those that the user gave beside it, by role."""
        self.config, self.checked, self.start, self.models = config, checked, start, models
        self.hands, self.listener = hands, listener
        self.answers: dict[int, ArtifactRef] = {}
        """Iteration -> its policy's answers to the held-out prompts."""
        self.unanswered: TransientError | None = None
        """Set if the tournament's judge did not answer: nothing of it is kept as a result, the next try plays it."""
        self.latest_reference = start
        """The reference of the last iteration, where it follows the policy."""
        self.policies: list[ArtifactRef] = []
        """The policies that iterations began with, newest first."""

    def play(self, place: Place) -> ArtifactRef:
        """Play all iterations. Returns the run's final policy: the best one under a gate, else the last."""
        config = self.config
        self.start = self.latest_reference = self.warm_start(place)
        gate = Gate(config.gate, self.start)
        heldout = self.hands.publish(self.checked.heldout, place.serving(Purpose.HELDOUT))
        policy, previous_pairs = self.start, None
        gate.begin(self.measure(policy, heldout, place))

        for iteration in range(1, config.iterations + 1):
            place = place._replace(iteration=iteration)
            reference = self.reference(policy, iteration)
            earlier_policies = self.earlier_policies(policy)

            prompts = self.prompts(place)
            generations = self.sample(prompts, policy, place)
            pairs = self.score(prompts, generations, policy, place)
            helpers = self.auxiliary_models(last(pairs), policy, place)
            models = {"policy": policy} | earlier_policies | self.models | references(helpers)
            roles = {"prompts": prompts} | models | {"reference": reference}
            weighted = self.weigh(last(pairs), roles, place)
            earlier = self.weigh_again(previous_pairs, roles, place)
            trained = self.train(last(weighted), earlier, reference, policy, place)
            self.listener.built(place, **generations, **pairs, **helpers, **weighted, train=trained)

            previous_pairs = last(pairs)
            policy = self.best_checkpoint(trained, heldout, place)
            verdict = gate.judge(policy, self.measure(policy, heldout, place), iteration)
            if verdict is not None:
                self.listener.decided(place, verdict)
                policy = verdict.goes_on
                if verdict.stops:
                    break
        if config.tournament is not None:
            self.tournament(heldout, place)
        return gate.final(policy)

    def warm_start(self, place: Place) -> ArtifactRef:
        """Return the model that self-play starts from: the user's, or what the run's `warm_start` makes of it."""
        if self.config.warm_start is None:
            return self.start
        run, place = self.config.warm_start_run(), place.serving(Purpose.WARM_START)
        prompts = self.hands.publish(self.checked.train, place)
        inputs = {"prompts": prompts, "policy": self.start, "start": self.start}
        responses = self.hands.run("score", run.scoring_for_pairs(), place, **inputs)
        rows = self.hands.run("weigh", run.weighting_for_pairs(), place, pairs=responses.ref)
        trained = self.hands.run("train", run.training_for(0), place, pairs=rows.ref, policy=self.start)
        self.listener.built(place, score=responses, weigh=rows, train=trained)
        return trained.ref

    def reference(self, policy: ArtifactRef, iteration: int) -> ArtifactRef:
        """The model that the iteration's log-ratios are against, as the run's `reference` says."""
        rule = self.config.reference_rule
        if rule == "start":
            return self.start
        if isinstance(rule, ModelRef):
            return self.models["reference"]
        if rule == "iterate" or (iteration - 1) % rule.every == 0:
            self.latest_reference = policy
        return self.latest_reference

    def earlier_policies(self, policy: ArtifactRef) -> dict[str, ArtifactRef]:
        """The policies before this one that the loss compares with too, by role; fewer in the first iterations.

        A policy that the gate went back to counts once, as the current one.
        """
        self.policies = [policy, *(earlier for earlier in self.policies if earlier != policy)]
        return dict(zip(EARLIER, self.policies[1 : self.config.policies_compared], strict=False))

    def prompts(self, place: Place) -> ArtifactRef:
        """Return the iteration's prompts, with the teacher's answers as responses if `answers_from_teacher` is set."""
        config, hands = self.config, self.hands
        prompts = part_of(
            self.checked.train,
            place.iteration - 1,
            config.iterations,
            config.prompts.per_iteration,
            config.prompts.reuse,
            config.seed,
        )
        ref = hands.publish(prompts, place)
        if not config.prompts.answers_from_teacher:
            return ref
        place = place.serving(Purpose.TEACHER)
        # Another seed: with the policy's own, a teacher that is the start model would write the policy's candidates.
        sampling = config.sampling_for_training().model_copy(update={"num_candidates": 1, "seed": config.seed + 1})
        answers = hands.run("sample", sampling, place, prompts=ref, policy=self.models["teacher"])
        texts = hands.read_answers(answers.ref)
        answered = [number for number, row in enumerate(prompts) if texts.get(row["prompt_id"], "").strip()]
        prompts = prompts.take(np.array(answered, np.int64))
        return hands.publish(prompts.map(lambda _, row: {**row, "response": texts[row["prompt_id"]]}), place)

    def sample(self, prompts: ArtifactRef, policy: ArtifactRef, place: Place) -> dict[str, Built]:
        """Return the policy's candidates; {} if the pairing reads responses from the data instead."""
        if not PAIRINGS.get(self.config.pairing).candidates:
            return {}
        return self.refined("sample", self.config.sampling_for_training(), place, prompts=prompts, policy=policy)

    def score(
        self, prompts: ArtifactRef, generations: dict[str, Built], policy: ArtifactRef, place: Place
    ) -> dict[str, Built]:
        """Return preference pairs, or single scored responses."""
        inputs = {"prompts": prompts, "policy": policy, "start": self.start}
        if generations:
            inputs["generations"] = last(generations)
        return self.refined("score", self.config.scoring_for_pairs(), place, **inputs)

    def auxiliary_models(self, pairs: ArtifactRef, policy: ArtifactRef, place: Place) -> dict[str, Built]:
        """Train the positive, negative and reward models that the user did not give, on these pairs."""
        training, built = self.config.auxiliary_training(), {}
        for role in self.config.roles:
            if role in self.models:
                continue
            at = place.serving(Purpose.AUXILIARY, role)
            runtime = self.config.weighting.runtime
            weighting = WeightingConfig(dtype=training.dtype, swap=role == "negative", runtime=runtime)
            weighted = self.hands.run("weigh", weighting, at, pairs=pairs, reference=policy)
            inputs = {"pairs": weighted.ref, "policy": policy} | self.adapters_base(training, policy)
            built[role] = self.hands.run("train", training, at, **inputs)
        return built

    def weigh(self, pairs: ArtifactRef, roles: dict[str, ArtifactRef], place: Place) -> dict[str, Built]:
        """Return the pairs with token weights and reference log-probs. `roles`: the stage's other inputs by name."""
        return self.refined("weigh", self.config.weighting_for_pairs(), place, pairs=pairs, **roles)

    def weigh_again(
        self, previous_pairs: ArtifactRef | None, roles: dict[str, ArtifactRef], place: Place
    ) -> ArtifactRef | None:
        """Return the previous iteration's pairs, weighed under this one's reference; None without `mix_previous`."""
        if not self.config.mix_previous or previous_pairs is None:
            return None
        place = place.serving(Purpose.PREVIOUS)
        return self.hands.run("weigh", self.config.weighting_for_pairs(), place, pairs=previous_pairs, **roles).ref

    def train(
        self,
        weighted: ArtifactRef,
        earlier: ArtifactRef | None,
        reference: ArtifactRef,
        policy: ArtifactRef,
        place: Place,
    ) -> Built:
        """Return the policy trained on the weighted pairs, and on the `earlier` ones if there are any."""
        training = self.config.training_for(place.iteration - 1)
        inputs = {"pairs": weighted, "policy": policy} | self.adapters_base(training, policy)
        if self.config.live_reference:
            inputs["reference"] = reference
        if "teacher_logits" in self.config.spec.needs(self.config.method):
            inputs["teacher"] = self.models["teacher"]
        if earlier is not None:
            inputs["more_pairs"] = earlier
        return self.hands.run("train", training, place, **inputs)

    def adapters_base(self, training: TrainingConfig, policy: ArtifactRef) -> dict[str, ArtifactRef]:
        """Return the start model as an input, if the training goes on with the policy's adapter of it."""
        adapter = self.config.training.adapter
        if adapter is None or not adapter.goes_on or training.adapter != adapter or policy == self.start:
            return {}
        return {"start": self.start}

    def measure(self, policy: ArtifactRef, heldout: ArtifactRef, place: Place) -> Measurement | None:
        """Return a policy's scores, lengths and benchmarks on the held-out prompts; None in a rehearsal."""
        place = place.serving(Purpose.HELDOUT)
        answers = self.hands.run("sample", self.config.sampling_for_heldout(), place, prompts=heldout, policy=policy)
        inputs = {"prompts": heldout, "generations": answers.ref, "policy": policy, "start": self.start}
        report = self.hands.run("evaluate", self.checked.evaluation, place, **inputs)
        self.listener.measured(place, answers, report)
        self.answers[place.iteration] = answers.ref
        return self.hands.read_report(report.ref)

    def best_checkpoint(self, trained: Built, heldout: ArtifactRef, place: Place) -> ArtifactRef:
        """Return the checkpoint of a training that has the best held-out score (SPPO's rule)."""
        if not self.config.training.checkpoints:
            return trained.ref
        checkpoints, measurements = checkpoints_of(trained, self.config.training.checkpoints), []
        for number, policy in enumerate(checkpoints, start=1):
            at = place.serving(Purpose.CHECKPOINT, number)
            answers = self.hands.run("sample", self.config.sampling_for_heldout(), at, prompts=heldout, policy=policy)
            inputs = {"prompts": heldout, "generations": answers.ref, "policy": policy, "start": self.start}
            report = self.hands.run("evaluate", self.checked.evaluation.heldout_only(), at, **inputs)
            measurements.append(self.hands.read_report(report.ref))
        measured = [measurement for measurement in measurements if measurement is not None]
        if len(measured) < len(checkpoints):  # a rehearsal: nothing is measured yet
            return checkpoints[-1]
        chosen, gains = select_checkpoint(measured, self.config.gate)
        self.listener.selected(place, checkpoints, measured, gains, chosen)
        return checkpoints[chosen]

    def tournament(self, heldout: ArtifactRef, place: Place) -> None:
        """Round-robin of the policies and the baselines on the held-out prompts."""
        settings = self.config.tournament
        assert settings is not None
        iterations = list(self.answers)
        players = {str(iterations[i]): self.answers[iterations[i]] for i in spread(len(iterations), MOST_ITERATIONS)}
        for name, model in settings.baselines.items():
            policy = resolve(model, self.config.sampling.template == "chat", Store(place.store))
            at = place.serving(Purpose.BASELINE, name)
            answers = self.hands.run("sample", self.config.sampling_for_heldout(), at, prompts=heldout, policy=policy)
            players[name] = answers.ref
        place = place.serving(Purpose.TOURNAMENT)
        inputs = {"prompts": heldout, "generations": self.hands.merge(players, place), "start": self.start}
        try:
            scored = self.hands.run("score", scoring_of(settings.scorer), place, **inputs)
        except TransientError as error:  # shown as unscored; the caller raises it when all else is done
            scored, self.unanswered = None, error
        self.listener.compared(settings.scorer.name, list(players), scored, len(self.checked.heldout))

    def refined(self, stage: str, settings: Config, place: Place, **inputs: ArtifactRef) -> dict[str, Built]:
        """Run a stage, and after it every stage of the run's `refine` that follows it, each on the artifact before.

        Returns stage name -> artifact, in this order.
        """
        artifacts = {stage: self.hands.run(stage, settings, place, **inputs)}
        for name, refinement in self.config.refinements_after(stage):
            consumes = {role.rstrip("?"): kind for role, kind in STAGES[name].consumes.items()}
            available = {role: ref for role, ref in inputs.items() if role in consumes}
            available |= {role: last(artifacts) for role, kind in consumes.items() if kind == STAGES[stage].produces}
            artifacts[name] = self.hands.run(name, refinement, place, **available)
        return artifacts


def last(artifacts: dict[str, Built]) -> ArtifactRef:
    """Return the artifact that the next stage reads: that of the last refinement."""
    return list(artifacts.values())[-1].ref


def references(artifacts: dict[str, Built]) -> dict[str, ArtifactRef]:
    """Return the artifacts' references, by the same names."""
    return {name: built.ref for name, built in artifacts.items()}


def checkpoints_of(trained: Built, fractions: Sequence[float]) -> list[ArtifactRef]:
    """Checkpoints of one training, oldest first. Intermediate ones get a content digest of their own files."""
    if trained.signed is None:  # a rehearsal: nothing is trained yet
        return [trained.ref] * (len(fractions) + 1)
    checkpoints, files = [], trained.record.files
    for name in sorted({file.name.split("/")[1] for file in files if file.name.startswith(f"{STEPS}/")}):
        prefix = f"{STEPS}/{name}/"
        inside = [file for file in files if file.name.startswith(prefix)]
        relative = [file.model_copy(update={"name": file.name.removeprefix(prefix)}) for file in inside]
        checkpoints.append(
            ArtifactRef(
                kind=trained.ref.kind,
                key=f"{trained.ref.key}/{STEPS}/{name}",
                path=f"{trained.ref.path}/{STEPS}/{name}",
                content=content_digest(relative),
            )
        )
    return [*checkpoints, trained.ref]
