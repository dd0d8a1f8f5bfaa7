"""More guards, by the part of the package that they stand in; see ``mutations_table``."""

from __future__ import annotations

from helpers.mutations import Mutation as M

ALLOCATION, BUDGET = "tests/allocation/test_allocation.py", "tests/allocation/test_budget.py"
REQUEST, RECORDS = "tests/allocation/test_request.py", "tests/records/test_records.py"
OLD, TUNER = "tests/lora_moe/test_old.py", "tests/lora_moe/test_tuner.py"
PARTS = (
    # allocation
    M(
        "parameters: closest from below",
        "allocation/spend.py",
        "room = min(gap, sum(steps)) // unit",
        "room = min(gap, sum(steps)) // unit // 2",
        BUDGET + " -k closer",
    ),
    M(
        "pool: a group's part of T",
        "allocation/sharing.py",
        "own = round(budget * len(group) / self.layers)",
        "own = budget",
        BUDGET + " -k compared",
    ),
    M(
        "official repair: bounds",
        "allocation/rounding.py",
        "if count < 0 or not bounds.allow(count):",
        "if False:",
        ALLOCATION + " -k official_repair_keeps",
    ),
    M(
        "MoLA: consecutive layers",
        "allocation/strategies/mola.py",
        "groups[i * len(groups) // layers]",
        "groups[i % len(groups)]",
        ALLOCATION + " -k mola",
    ),
    M(
        "settings of another strategy",
        "allocation/settings.py",
        "if owners and strategy not in owners:",
        "if False:",
        REQUEST,
    ),
    M(
        "linears stored transposed",
        "allocation/units.py",
        "d_in = matrix.shape[0] if transposed else matrix.shape[1]",
        "d_in = matrix.shape[1]",
        BUDGET + " -k conv1d",
    ),
    M(
        "ranks: escaped patterns",
        "allocation/exports/peft_rank.py",
        "keys = [re.escape(name) for name in _selected(",
        "keys = [name for name in _selected(",
        "tests/allocation/test_export.py -k escaped",
    ),
    # records
    M(
        "counts sum to the budget",
        "records/decisions.py",
        "if sum(self.experts) != self.budget:",
        "if False:",
        RECORDS + " -k wrong_allocation",
    ),
    M(
        "null numbers have a reason",
        "records/facts.py",
        "if layer.reason is None and any(",
        "if False and any(",
        RECORDS + " -k null_of_a_layer",
    ),
    M(
        "bare file names",
        "records/facts.py",
        "or any(c in name for c in",
        "or any(c == name for c in",
        RECORDS + " -k wrong_allocation",
    ),
    M(
        "NaN is never written",
        "records/json.py",
        "allow_nan=False",
        "allow_nan=True",
        RECORDS + " -k nan",
    ),
    # lora_moe
    M(
        "gates: renormalised",
        "lora_moe/gates.py",
        "return Routing(kept.softmax(-1), logits, kept)",
        "return Routing(logits.softmax(-1) * (kept > -math.inf), logits, kept)",
        OLD + " -k alphalora",
    ),
    M(
        "AdaMoLE: threshold over N",
        "lora_moe/gates.py",
        "tau_logit.sigmoid() / logits.shape[-1]",
        "tau_logit.sigmoid()",
        OLD + " -k adamole",
    ),
    M(
        "GOAT: residual",
        "lora_moe/systems/goat.py",
        "lora_moe_res_B[adapter], -1.0)",
        "lora_moe_res_B[adapter], 1.0)",
        OLD + " -k goat",
    ),
    M(
        "adapter: another base",
        "lora_moe/model.py",
        "if peft_config.base_probe is not None and peft_config.check_base:",
        "if False:",
        TUNER + " -k another_base",
    ),
    M(
        "patterns that match nothing",
        "lora_moe/model.py",
        "if not any(matches(pattern, name) for name in names):",
        "if False:",
        TUNER + " -k bad_layouts",
    ),
    M(
        "top_k of a layer",
        "lora_moe/build.py",
        'config["top_k_pattern"].setdefault(name, k)',
        "pass",
        "tests/lora_moe/test_build.py -k top_k",
    ),
    # checkpoints
    M(
        "header: overlaps and gaps",
        "checkpoints/header.py",
        "if moved.begin != place:",
        "if False:",
        "tests/checkpoints/test_checkpoint.py -k corrupt_headers",
    ),
    M(
        "absurd block numbers",
        "checkpoints/layers.py",
        "if max(found[stack]) >= MAX_BLOCKS:",
        "if max(found[stack]) >= 10**12:",
        "tests/checkpoints/test_layers.py -k absurd",
    ),
    # cli
    M(
        "another allocation is kept",
        "cli/allocate.py",
        "return None if same else ",
        "return None if True else ",
        "tests/cli/test_cli.py -k differs_is_kept",
    ),
    M(
        "another analysis is kept",
        "analysis/outputs.py",
        "if before[key] != value:",
        "if False:",
        "tests/analysis/test_kept.py -k other_settings",
    ),
    M(
        "a setting given twice",
        "cli/allocate.py",
        "if own.get(name) is not None:",
        "if False:",
        REQUEST + " -k can_be_set",
    ),
    M(
        "tokens",
        "cli/secrets.py",
        "text = text.replace(secret, HIDDEN)",
        "pass",
        "tests/cli/test_secrets.py -k known",
    ),
    M(
        "wrong usage exits with 2",
        "cli/failures.py",
        "2 if isinstance(error, UnknownName) else 1",
        "1",
        "tests/cli/test_help.py -k unknown_name",
    ),
    M(
        "errors name options",
        "cli/failures.py",
        "flags(name)[0] if name in parameters else name",
        "name",
        REQUEST + " -k or_its_option",
    ),
    # training
    M(
        "whole ranks sum up",
        "training/baselines.py",
        "carry += rank - made[name]",
        "pass",
        "tests/training/test_run.py -k ranks_are_whole",
    ),
    M(
        "a recipe's warm-up",
        "training/settings.py",
        "if not 0 <= self.warmup < 1:",
        "if False:",
        "tests/training/test_run.py -k nonsense",
    ),
    M(
        "settings of another system",
        "training/methods.py",
        "if key not in method.settings:",
        "if False:",
        "tests/training/test_baselines.py -k does_not_fit",
    ),
)
