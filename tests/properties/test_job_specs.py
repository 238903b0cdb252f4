"""2,000 specs from the CRD's schema, half of them with something wrong: nothing crashes, and what is wrong is named.

The seed is printed; FINETUNE_FUZZ_SEED sets another one, FINETUNE_FUZZ_EXAMPLES how many.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from datetime import timedelta
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_cli import job_plans
from finetune_operator.api.finetunejob import FineTuneJobSpec, FineTuneJobStatus
from finetune_operator.api.finetunejob_status import Upstream
from finetune_operator.core import jobs
from finetune_operator.core.facts import JobFacts, Observed
from finetune_operator.manifests import rayjobs, runfiles
from finetune_operator.reconcile import facts
from finetune_trainer import runfile
from finetune_trainer.failures import BadConfig
from tests import specs
from tests.specs import Broken, Json
from tests.unit.fit import models
from tests.unit.operator.stories import ARTIFACT, DEFAULTS, START, rayjob, result, training

EXAMPLES = int(os.environ.get("FINETUNE_FUZZ_EXAMPLES", "500"))  # of each of four kinds
SEED = int(os.environ.get("FINETUNE_FUZZ_SEED", "20261121"))
FAST = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
REWARD = Upstream(uri="s3://chain/reward", digest=f"sha256:{0:064x}")
PLATFORMS = [
    rayjobs.Platform(mode, "http://operator:8090", None, 30)
    for mode in ("K8sJobMode", "SidecarMode", "HTTPMode")
]


@pytest.fixture(scope="module", autouse=True)
def _print_seed() -> None:
    print(f"fuzz seed {SEED} (FINETUNE_FUZZ_SEED)")


def body(spec: Any) -> Json:
    metadata = {"namespace": "team", "name": "triage", "uid": "0123abcd-1111", "generation": 1}
    return {"metadata": metadata, "spec": spec}


def play(job: JobFacts) -> list[FineTuneJobStatus]:
    """What the operator makes of a job: refused, created, waiting, running, failed, again, succeeded."""
    now, told = START, []
    seen: list[dict[str, Any]] = [
        {},
        {},
        {"rayjob": rayjob("Initializing")},
        {"rayjob": rayjob("Running", "RUNNING"), "report": training(step=3, saved=2)},
        {"rayjob": rayjob("Failed", "FAILED", message="Job entrypoint command failed with exit code 80")},
        {},
        {},
        {"report": result("Succeeded", 0, step=10, artifact=ARTIFACT)},
    ]
    for one in seen if job.spec is not None else seen[:2]:
        if "report" in one:
            one["reported_at"] = now
        plan = jobs.decide(Observed(job=job, **one), defaults=DEFAULTS, now=now)
        json.dumps(facts.to_json(plan.status), allow_nan=False)
        job = replace(job, status=plan.status)
        told.append(plan.status)
        now += timedelta(seconds=601)
    return told


def build(spec: FineTuneJobSpec) -> list[Json]:
    """The run file and the RayJobs of the spec."""
    places = runfiles.Places(
        spec.model.uri or "s3://chain/model",
        spec.output.uri or "s3://default/out",
        spec.checkpoint.uri,
        reward=REWARD if spec.reward is not None and spec.reward.fine_tune_job_ref else None,
    )
    run_file = runfiles.build_run_file(
        namespace="team", name="triage", uid="u", attempt=1, spec=spec, places=places
    )
    owner = rayjobs.Owner("team", "triage", "u")
    built = [
        rayjobs.build_rayjob(
            owner,
            name="triage-a1",
            attempt=1,
            spec=spec,
            image="i",
            places=places,
            platform=platform,
            inspect=inspect,
        )
        for platform in PLATFORMS
        for inspect in (False, True)
    ]
    for one in built:
        json.dumps(one, allow_nan=False)
    return [run_file, *built]


@hypothesis.seed(SEED)
@FAST
@given(spec=specs.valid_specs())
def test_a_valid_spec_is_understood_and_built(spec: Json) -> None:
    job = facts.job_facts(body(spec))
    assert job.problem is None
    assert job.spec is not None
    run_file, *_ = build(job.spec)
    runfile.parse(json.dumps(run_file))
    last = play(job)[-1]
    suspended = spec.get("suspend", False)
    assert last.phase in ({"Suspended", "Succeeded"} if suspended else {"Succeeded", "Failed", "Pending"})
    for config in (models.LLAMA_3_8B, models.SMOLLM2_135M):
        plan = job_plans.plan_job(job.spec, config, None, job_plans.Assumptions(rows=1000))
        json.dumps(job_plans.to_data(plan), allow_nan=False)


@hypothesis.seed(SEED)
@FAST
@given(broken=specs.broken_specs())
def test_a_broken_spec_is_a_problem_that_names_the_field_and_never_a_crash(broken: Broken) -> None:
    job = facts.job_facts(body(broken.spec))
    if broken.known_to_models:
        assert job.spec is None or broken.how.startswith("unknown field"), broken.how
        assert broken.field in (job.problem or ""), f"{broken.how}: {job.problem}"
    for status in play(job):
        assert len(status.message or "") <= 4096
        assert not status.attempts or job.problem is None, "nothing begins from half a spec"
    facts.upstream_names(body(broken.spec))
    if job.spec is not None:
        build(job.spec)


@pytest.mark.parametrize("wrong", [True, False, 1.0, 2.5, {"a": 1}, "-1", "1001"])
def test_a_count_of_preemptions_is_a_number_or_unlimited(wrong: Any) -> None:
    spec = {"model": {"uri": "hf://acme/tiny"}, "dataset": {"sources": [{"uri": "s3://data/a.jsonl"}]}}
    assert facts.job_facts(body(spec)).spec is not None
    assert "retry.preemptions" in (
        facts.job_facts(body(spec | {"retry": {"preemptions": wrong}})).problem or ""
    )


@hypothesis.seed(SEED)
@FAST
@given(spec=specs.valid_specs(), data=st.data())
def test_a_run_file_with_anything_in_it_is_read_or_refused(spec: Json, data: st.DataObject) -> None:
    found = facts.job_facts(body(spec)).spec
    assert found is not None
    run_file = specs.replaced(build(found)[0], data.draw)
    try:
        parsed = runfile.parse(json.dumps(run_file))
    except BadConfig as error:
        assert str(error)  # noqa: PT017
        return
    assert parsed.api_version == "trainer/v1"


@hypothesis.seed(SEED)
@FAST
@given(spec=specs.valid_specs(), data=st.data())
def test_junk_anywhere_in_a_spec_never_crashes_the_operator(spec: Json, data: st.DataObject) -> None:
    junk = body(specs.replaced(spec, data.draw))
    facts.upstream_names(junk)
    job = facts.job_facts(junk)
    play(job)
    if job.spec is not None:
        build(job.spec)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "3", '"a"', "{", "\x00", "{}" * 3, "[" * 5000, '{"apiVersion": NaN}']
)
def test_text_that_is_no_run_file_is_refused(text: str) -> None:
    with pytest.raises(BadConfig):
        runfile.parse(text)


@pytest.mark.parametrize(
    "spec", [None, [], "text", 3, {"model": []}, {"model": {"fineTuneJobRef": "x"}}, {"a": "b" * 2**20}]
)
def test_a_spec_that_is_no_spec_at_all(spec: Any) -> None:
    job = facts.job_facts(body(spec))
    assert job.spec is None
    assert len(play(job)[-1].message or "") <= 4096
    assert facts.upstream_names(body(spec)) == []


def test_a_spec_of_a_mebibyte_is_one_problem_of_readable_length() -> None:
    huge = {
        "model": {"uri": "hf://a/b"},
        "dataset": {"sources": [{"uri": f"s3://b/{n}.jsonl", "x": "y" * 500} for n in range(2000)]},
    }
    job = facts.job_facts(body(huge))
    assert job.spec is None
    message = play(job)[-1].message or ""
    assert "spec.dataset.sources" in message
    assert len(message) <= 4096
