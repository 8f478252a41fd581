"""Mutation tests: each guard against bad input is removed in a copy of the program, and a test must then fail.

Slow: every guard costs a run of pytest. The tests named here pass on the untouched copy, which is checked first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]


class Guard(NamedTuple):
    """A piece of the program that stands between bad input and the user."""

    file: str
    code: str
    without: str
    """The same piece with the guard taken away."""
    test: str
    """What must fail then: a file of tests and its name there."""


PREDICT = "system/test_bad_input.py::test_predict_refuses_a_bad_image_and_writes_nothing"
TRAIN = "system/test_bad_input.py::test_train_refuses_a_bad_image_and_leaves_no_run"
LABEL = "system/test_bad_input.py::test_train_refuses_a_bad_label_map_and_leaves_no_run"
SETTING = "system/test_bad_input.py::test_train_refuses_a_bad_setting_before_reading_the_data"
RUN = "system/test_bad_input.py::test_predict_refuses_an_unusable_run_and_writes_nothing"
FILES = "data/files.py"
NIFTI, LAYOUTS, PREPARE = "data/nifti.py", "data/datasets/layouts.py", "data/preprocess.py"

GUARDS: dict[str, Guard] = {
    # Files and contrasts
    "a contrast missing": Guard(
        LAYOUTS,
        "    problems = missing_problems(contrasts, unrecognised)\n",
        "    problems = []\n",
        f"{TRAIN}[missing]",
    ),
    "a contrast missing where the run needs it": Guard(
        "app/inference/batch/predict.py",
        "        require_contrasts(case, self.model)\n",
        "",
        "system/test_missing_contrasts.py::test_a_run_that_needs_all_contrasts_points_to_contrast_dropout",
    ),
    "one OpenVINO core for the whole process": Guard(
        "app/inference/backends/openvino_backend.py",
        "@functools.cache\n",
        "",
        "app/inference/backends/test_backends.py::test_a_signal_after_networks_were_released_reaches_its_handler",
    ),
    "subsets of contrasts where the run needs all": Guard(
        "app/inference/subsets.py",
        "    if not model.takes_missing_contrasts:",
        "    if False:",
        "system/test_missing_contrasts.py::test_a_run_that_needs_all_contrasts_has_no_table_of_subsets",
    ),
    "an ensemble with weights of another run": Guard(
        "app/inference/ensemble.py",
        "    if model.sha256 != sha256:",
        "    if False:",
        "app/inference/test_ensemble.py::test_weights_of_another_run_are_refused",
    ),
    "an ensemble of networks that do not go together": Guard(
        "app/inference/ensemble.py",
        "        _require_alike(folder, shared, facts)\n",
        "",
        "app/inference/test_ensemble.py::test_networks_of_different_spacings_are_refused",
    ),
    "the folder of a cross-validation": Guard(
        "app/inference/ensemble.py",
        "    if (folder / CROSSVAL_FILE).exists():",
        "    if False:",
        "app/inference/test_ensemble.py::test_the_folder_of_a_cross_validation_points_to_its_ensemble",
    ),
    "more folds than patients": Guard(
        "app/experiments/crossval/plan.py",
        "    if not kept and count < folds:",
        "    if False:",
        "app/experiments/crossval/test_crossval.py::test_impossible_folds_are_refused",
    ),
    "folds of different spacings": Guard(
        "app/experiments/crossval/plan.py",
        "        _require_one_spacing(cases, splits)",
        "        pass",
        "app/experiments/crossval/test_crossval.py::test_cases_of_different_spacings_need_an_explicit_spacing",
    ),
    "another cross-validation in its folder": Guard(
        "app/experiments/runs.py",
        "    if changed:",
        "    if False:",
        "app/experiments/crossval/test_crossval.py::test_another_config_is_refused",
    ),
    "a cross-validation of other cases": Guard(
        "app/experiments/crossval/plan.py",
        "    if before != now:",
        "    if False:",
        "app/experiments/crossval/test_crossval.py::test_other_cases_are_refused",
    ),
    "an out-of-fold file that is cut short": Guard(
        "app/experiments/crossval/out_of_fold.py",
        "    except RunError:\n        return False\n",
        "    except KeyError:\n        return False\n",
        "app/experiments/crossval/test_crossval.py::test_a_truncated_file_is_treated_as_missing",
    ),
    "a checkpoint that contradicts its config": Guard(
        "app/inference/model.py",
        'if details.get("takes_missing_contrasts", False) != takes_missing_contrasts:',
        "if False:",
        "system/test_missing_contrasts.py::test_a_checkpoint_that_contradicts_its_config_is_refused",
    ),
    "cases the run trained on": Guard(
        "app/inference/subsets.py",
        "else case.id not in trained",
        "else True",
        "system/test_missing_contrasts.py::test_training_cases_are_left_out_unless_requested",
    ),
    "two files for one contrast": Guard(LAYOUTS, "if len(paths) > 1:", "if False:", f"{TRAIN}[two files]"),
    "contrasts on other grids": Guard(
        PREPARE, "    if difference is not None:", "    if False:", f"{TRAIN}[other origin]"
    ),
    "contrasts of other shapes": Guard(
        NIFTI, "    if first.voxels.shape != second.voxels.shape:", "    if False:", f"{TRAIN}[other shape]"
    ),
    "the axis and the mm": Guard(NIFTI, "by {abs(gaps[axis, corner]):.2f} mm on", "on", f"{TRAIN}[other slices]"),
    "4D": Guard(NIFTI, "if len(shape) != 3 or", "if", f"{TRAIN}[4D]"),
    "RGB": Guard(NIFTI, 'if dtype.kind not in "iuf":', "if False:", f"{TRAIN}[RGB]"),
    "complex": Guard(NIFTI, 'if dtype.kind not in "iuf":', 'if dtype.kind not in "iufc":', f"{TRAIN}[complex]"),
    "CIFTI": Guard(NIFTI, "if isinstance(image, nib.Cifti2Image) or", "if", f"{TRAIN}[CIFTI]"),
    "CIFTI, compressed": Guard(NIFTI, " or _claims_cifti(image)", "", f"{TRAIN}[CIFTI, compressed]"),
    "cut short": Guard(
        NIFTI,
        "except (EOFError, zlib.error, _ZLIB_NG_ERROR, gzip.BadGzipFile)",
        "except ZeroDivisionError",
        f"{TRAIN}[cut short]",
    ),
    "a checksum that does not fit": Guard(
        NIFTI,
        "    while stream.read(1 << 20):\n        pass\n",
        "",
        "data/test_nifti.py::test_the_checksum_of_a_4d_file_is_verified_for_any_volume",
    ),
    "empty": Guard(NIFTI, "path.stat().st_size == 0", "False", f"{TRAIN}[empty]"),
    "not gzip": Guard(NIFTI, "(ImageFileError, HeaderDataError, OSError,", "(", f"{TRAIN}[not gzip]"),
    "a header that claims too much": Guard(NIFTI, "> MAX_VOXELS", "> 1e99", f"{TRAIN}[huge]"),
    "a header that claims more than there is": Guard(
        NIFTI, "    if claimed > most:", "    if False:", f"{TRAIN}[more than there is]"
    ),
    "NaN": Guard(NIFTI, "if not nan_to_zero:", "if False:", f"{TRAIN}[NaN]"),
    "infinite": Guard(NIFTI, "not np.isfinite(voxels).all()", "np.isnan(voxels).any()", f"{TRAIN}[infinite]"),
    "NaN taken as 0": Guard(
        NIFTI,
        "np.where(bad, np.float32(0), voxels)",
        "voxels",
        "system/test_bad_input.py::test_replacing_nan_in_the_background_changes_no_voxel_of_the_prediction",
    ),
    "all zero": Guard(PREPARE, "    if not values.size:", "    if False:", f"{TRAIN}[all zero]"),
    "a mask": Guard(PREPARE, "    if np.ptp(values) == 0:", "    if False:", f"{TRAIN}[a mask]"),
    "a head with its skull": Guard(PREPARE, "    if share <= MAX_NONZERO_FACES:", "    if True:", f"{PREDICT}[skull]"),
    "another unit than mm": Guard(
        NIFTI,
        "    if not low <= smallest <= largest <= high:",
        "    if False:",
        f"{TRAIN}[in metres]",
    ),
    "sheared": Guard(NIFTI, "    if shear > SHEAR_TOLERANCE:", "    if False:", f"{TRAIN}[sheared]"),
    "a link out of the data": Guard(
        LAYOUTS, "if self._follow or not self._leads_out(path):", "if True:", f"{TRAIN}[link out]"
    ),
    "a link to a folder elsewhere": Guard(
        LAYOUTS,
        "problems += links.problems(folder) or [problem for path in paths for problem in links.problems(path)]",
        "problems += []",
        "system/test_bad_input.py::test_a_symlink_to_an_outside_folder_is_refused_and_named",
    ),
    "a dangling link": Guard(
        LAYOUTS, "if path.is_symlink() and not path.exists():", "if False:", f"{TRAIN}[dangling link]"
    ),
    "a case id that leads elsewhere": Guard(
        "data/datasets/case.py",
        "problems = problems or tuple(id_problems(self.id))",
        "problems = problems",
        "system/test_bad_input.py::test_a_case_object_with_a_path_traversal_id_is_refused",
    ),
    "a case id with dots": Guard(
        LAYOUTS,
        "    problems += id_problems(case_id)\n",
        "",
        "data/quality/test_check.py::test_a_case_id_that_is_not_a_valid_file_name_is_a_problem",
    ),
    "a split with an id that is no case": Guard(
        "data/datasets/splits.py",
        "    if unknown:",
        "    if False:",
        "system/test_bad_input.py::test_a_split_with_an_unknown_case_id_is_refused",
    ),
    # Fine-tuning
    "weights of another network": Guard(
        "app/training/pretrained.py",
        "    if others:",
        "    if False:",
        "app/training/test_pretrained.py::test_a_network_that_does_not_fit_is_refused_and_leaves_no_run[channels]",
    ),
    "weights for other contrasts": Guard(
        "app/training/pretrained.py",
        "    if model.takes_missing_contrasts != config.takes_missing_contrasts:",
        "    if False:",
        "app/training/test_pretrained.py::test_a_network_that_does_not_fit_is_refused_and_leaves_no_run[contrasts]",
    ),
    "weights of what is no run": Guard(
        "app/training/pretrained.py",
        'if not (run / "run.json").is_file() and newest_best(run) is None:',
        "if False:",
        "app/training/test_pretrained.py::test_a_folder_that_is_not_a_run_is_refused_with_an_explanation",
    ),
    "patience without validation cases": Guard(
        "app/training/run.py",
        "if config.training.patience is not None and split is not None and not split.validation:",
        "if False:",
        "app/training/test_recipe.py::test_patience_without_validation_cases_is_refused_before_a_folder_is_created",
    ),
    "gradients still scaled": Guard(
        "app/training/step.py",
        "        state.scaler.unscale_(state.optimizer)\n",
        "",
        "app/training/test_recipe.py::test_backward_normalization_ignores_loss_scale_and_micro_batch_count",
    ),
    # Label maps
    "no label map": Guard("app/training/cases.py", "    if without:", "    if False:", f"{LABEL}[missing]"),
    "labels outside the convention": Guard(
        "data/labels.py",
        '    if foreign:\n        raise DataError(\n            f"label values {sorted',
        '    if False:\n        raise DataError(\n            f"label values {sorted',
        f"{LABEL}[outside the convention]",
    ),
    "3 and 4 together": Guard("data/labels.py", "if {3, 4} <= seen:", "if False:", f"{LABEL}[3 and 4 together]"),
    "label numbers that nothing tells": Guard(
        "data/labels.py",
        "if not case_folders and 4 not in seen",
        "if False and 4 not in seen",
        "data/datasets/test_descriptions.py::test_a_flat_folder_with_uninformative_names_is_refused_with_the_flag",
    ),
    "a cavity that may be enhancing tumour": Guard(
        "data/labels.py",
        "    if 4 in seen and 3 not in seen:",
        "    if False:",
        "data/datasets/test_descriptions.py::test_values_that_do_not_determine_the_year_are_refused_with_the_flag",
    ),
    "two years taken for a cavity": Guard(
        LAYOUTS,
        "    if not any({3, 4} <= set(found) for found in values.values()):",
        "    if False:",
        "data/datasets/test_descriptions.py::test_labels_of_two_mixed_years_are_not_mistaken_for_cavities",
    ),
    "a path of a manifest out of the data": Guard(
        LAYOUTS,
        "    problems += [problem for path in case.files for problem in links.problems(path)]\n",
        "",
        "data/datasets/test_descriptions.py::test_a_manifest_path_that_is_missing_or_outside_the_data_is_a_problem",
    ),
    "a label map on another grid": Guard(
        PREPARE,
        '    _require_same_grid(case.id, canonical, label, "the label map", case.reference)\n',
        "",
        f"{LABEL}[another grid]",
    ),
    "a label map of fractions": Guard(NIFTI, "    if off.any():", "    if False:", f"{LABEL}[fractions]"),
    "NaN in a label map": Guard(NIFTI, "    if volume.zeroed:", "    if False:", f"{LABEL}[NaN]"),
    # Configs
    "a mistyped key": Guard(
        "app/config/load.py",
        "difflib.get_close_matches(path, allowed, n=1, cutoff=0.75)",
        "None",
        f"{SETTING}[mistyped key]",
    ),
    "an unknown key": Guard(
        "app/config/load.py", 'ConfigDict(extra="forbid", strict', "ConfigDict(strict", "app/config/test_load.py"
    ),
    "text for a number": Guard("app/config/load.py", "strict=True, ", "", f"{SETTING}[text for a number]"),
    "a patch that does not fit": Guard(
        "app/config/load.py", "        if bad:\n", "        if False:\n", f"{SETTING}[patch]"
    ),
    "a config nested without end": Guard(
        "app/config/load.py",
        "(yaml.YAMLError, ValueError, RecursionError)",
        "(yaml.YAMLError, ValueError)",
        "system/test_bad_input.py::test_an_excessively_nested_config_is_refused",
    ),
    # Runs
    "a run that is not there": Guard(
        "app/inference/model.py", "    if not run.is_dir():", "    if False:", f"{RUN}[not there]"
    ),
    "a run without weights": Guard(
        "app/inference/model.py", "    if checkpoint is None:", "    if False:", f"{RUN}[without weights]"
    ),
    "changed weights": Guard(
        "app/runs/checkpoints.py", '    if digest != details.get("sha256"):', "    if False:", f"{RUN}[a changed bit]"
    ),
    "a damaged checkpoint is not the end": Guard(
        "app/runs/checkpoints.py",
        "            refused.append(str(error))\n            continue\n",
        "            raise\n",
        "app/runs/test_checkpoints.py::test_if_the_newest_pair_is_damaged_the_previous_one_is_used_with_a_warning",
    ),
    "a changed JSON of a checkpoint": Guard(
        "app/runs/checkpoints.py",
        "    if details.pop(_OWN_DIGEST, None) not in",
        "    if details.pop(_OWN_DIGEST, None) and None not in",
        "app/runs/test_checkpoints.py::test_if_the_newest_pair_is_damaged_the_previous_one_is_used_with_a_warning",
    ),
    "the disk has it before an older pair goes": Guard(
        "app/runs/folder.py",
        "        sync_file(file, path)\n",
        "",
        "app/runs/test_checkpoints.py::test_data_and_directory_entries_are_synced_before_an_older_pair_is_removed",
    ),
    "a loss that is not finite": Guard(
        "app/training/trainer.py",
        "            if not math.isfinite(result.loss):",
        "            if False:",
        "system/test_never_lost.py::test_a_non_finite_loss_rolls_the_run_back_and_continues_with_other_patches",
    ),
    "weights that are not finite": Guard(
        "app/training/trainer.py",
        "        if not rollback.weights_are_finite(self.state.network):",
        "        if False:",
        "system/test_never_lost.py::test_non_finite_weights_are_never_saved",
    ),
    "other patches after a return": Guard(
        "app/training/trainer.py",
        "        state.patches = next_patch\n",
        "",
        "system/test_never_lost.py::test_a_non_finite_loss_rolls_the_run_back_and_continues_with_other_patches",
    ),
    "a disk that is full for a while": Guard(
        "app/system/disk_full.py",
        "if error.errno not in _FULL or self.stopped():",
        "if True:",
        "system/test_never_lost.py::test_a_checkpoint_on_a_full_disk_is_saved_once_space_is_available",
    ),
    "SIGUSR1 before training": Guard(
        "app/training/run.py",
        "@not_ended_by_sigusr1()\ndef start(",
        "def start(",
        "system/test_never_lost.py::test_sigusr1_during_preparation_does_not_end_the_run",
    ),
    "a changed config of a resumed run": Guard(
        "app/training/config_changes.py",
        "    if not fixed and not lacking:",
        "    if not fixed:",
        "system/test_never_lost.py::test_a_change_of_the_learning_task_is_shown_and_refused_unless_allowed",
    ),
    "a change that does not fit the weights": Guard(
        "app/training/config_changes.py",
        "    if not fixed and not lacking:",
        "    if not lacking:",
        "system/test_never_lost.py::test_fixed_settings_are_refused_with_the_reason_even_if_allowed",
    ),
    "pickled weights": Guard(
        "app/runs/checkpoints.py",
        "    except SafetensorError as error:",
        "    except ZeroDivisionError as error:",
        f"{RUN}[a pickle]",
    ),
    "a run that is in use": Guard(
        "app/runs/folder.py",
        "            lock(file, run)\n",
        "            pass\n",
        "app/training/test_run.py::test_a_second_process_is_refused_and_leaves_the_folder_unchanged",
    ),
    # Output and machine
    "an output that is a file": Guard(
        "app/inference/batch/output_folder.py",
        "    if output.exists() and not output.is_dir():",
        "    if False:",
        "system/test_bad_input.py::test_an_output_that_is_a_file_is_refused_and_kept",
    ),
    "the place in a system error": Guard(
        FILES,
        "        raise OSError(error.errno, what, error.filename if named else str(path)) from error",
        "        raise",
        "system/test_hostile_machine.py::test_phantoms_on_a_full_disk_are_refused_naming_the_path",
    ),
    "a half-written file goes": Guard(
        FILES,
        "        partial.unlink(missing_ok=True)",
        "        pass",
        "system/test_hostile_machine.py::test_predict_on_a_full_disk_leaves_no_partial_label_map",
    ),
    "no permission to read": Guard(
        NIFTI,
        "    if not os.access(path, os.R_OK):",
        "    if False:",
        "system/test_hostile_machine.py::test_an_image_without_read_permission_is_bad_data",
    ),
    "no permission to write": Guard(
        "data/filesystem.py",
        '**dict.fromkeys(("EACCES", "EPERM"), _NO_PERMISSION),',
        '"EACCES": _OTHER,',
        "system/test_hostile_machine.py::test_predict_into_a_read_only_folder_is_refused",
    ),
    "SIGTERM while predicting": Guard(
        "app/cli/main.py",
        "with outlasting_streams(), terminal.signals_unwind():",
        "if True:",
        "system/test_hostile_machine.py::test_predict_stopped_by_a_signal_leaves_only_complete_files",
    ),
    "Ctrl-C while predicting": Guard(
        "app/inference/batch/cohort.py",
        "    except KeyboardInterrupt as error:",
        "    except ZeroDivisionError as error:",
        "system/test_hostile_machine.py::test_predict_stopped_by_a_signal_leaves_only_complete_files",
    ),
    "Ctrl-C and SIGTERM while training": Guard(
        "app/training/signals.py",
        "        request.signal_name = signal.Signals(number).name\n",
        "",
        "app/training/test_run.py::test_a_run_stopped_by_a_signal_says_how_to_resume_and_reaches_the_same_result",
    ),
    "a run that was stopped while it prepared": Guard(
        "app/training/run.py",
        "                (run / LOCK).unlink()\n                run.rmdir()\n",
        "                pass\n",
        "system/test_hostile_machine.py::test_sigterm_before_the_first_step_does_not_prevent_a_new_start",
    ),
    "threads instead of worker processes": Guard(
        "data/patches/sampler.py",
        '    pool = ThreadPoolExecutor(threads, thread_name_prefix="patches")',
        "    from concurrent.futures import ProcessPoolExecutor\n\n    pool: Any = ProcessPoolExecutor(threads)",
        "system/test_hostile_machine.py::test_training_has_no_worker_process_that_could_be_killed",
    ),
    "a traceback with --debug alone": Guard(
        "app/cli/terminal.py",
        "    if settings.debug:",
        "    if True:",
        "system/test_bad_input.py::test_a_traceback_is_shown_only_with_debug",
    ),
}


ZSCORE, HOOK, BACKWARD = "znorm/zscore.py", "znorm/hook.py", "znorm/backward.py"

#: The traps of real training, and what keeps ZNorm out of them.
TRAPS: dict[str, Guard] = {
    "gradients still scaled": Guard(
        HOOK,
        "        _refuse_scaled(optimizer)\n",
        "",
        "znorm/test_hook.py::test_gradients_that_are_still_scaled_are_refused",
    ),
    "closures": Guard(
        HOOK,
        "        _refuse_closure(args, kwargs)\n",
        "",
        "znorm/test_hook.py::test_a_closure_is_refused_before_anything_changes",
    ),
    "a second attach": Guard(
        HOOK, "    if optimizer in _attached:", "    if False:", "znorm/test_hook.py::test_a_second_attach_is_refused"
    ),
    "sparse gradients": Guard(
        HOOK,
        "    if gradient.layout is not torch.strided:",
        "    if False:",
        "znorm/test_hook.py::test_a_sparse_gradient_is_refused",
    ),
    "parameters without a gradient": Guard(
        HOOK,
        "            if parameter.grad is None:\n                continue\n",
        "",
        "znorm/test_hook.py::test_frozen_parameters_keep_their_values_and_the_others_step",
    ),
    "several groups of parameters": Guard(
        HOOK,
        "for group in optimizer.param_groups for parameter in group",
        "for group in optimizer.param_groups[:1] for parameter in group",
        "znorm/test_hook.py::test_every_parameter_group_is_normalised",
    ),
    "parameters added later": Guard(
        HOOK,
        "            return self._channel_dims[id(parameter)]",
        "            return self._channel_dims.get(id(parameter))",
        "znorm/test_transforms.py::test_parameters_added_after_attaching_are_refused_at_the_step",
    ),
    "a number that is not finite, in what is normalised": Guard(
        HOOK,
        "finite = both(finite, self._rule(work))",
        "self._rule(work)",
        "znorm/test_hook.py::test_a_step_with_a_non_finite_gradient_changes_nothing",
    ),
    "a number that is not finite, in what is not": Guard(
        HOOK,
        "finite = are_finite(others)",
        "finite: Finite = True",
        "znorm/test_hook.py::test_a_step_with_a_non_finite_gradient_changes_nothing",
    ),
    "a skipped step is counted": Guard(
        HOOK,
        "self._skipped += 1",
        "pass",
        "znorm/test_hook.py::test_a_step_with_a_non_finite_gradient_changes_nothing",
    ),
    "accumulation: once a step": Guard(
        HOOK,
        "optimizer.register_step_pre_hook(self._before_step)",
        "[p.register_post_accumulate_grad_hook(lambda t: zscore_([t.grad]) and None) for p in parameters][0]",
        "znorm/test_hook.py::test_gradients_accumulated_over_micro_batches_are_normalised_once",
    ),
    "two processes: after the all-reduce": Guard(
        HOOK,
        "optimizer.register_step_pre_hook(self._before_step)",
        "[p.register_hook(lambda g: (g - g.mean()) / g.std()) for p in parameters if p.dim() > 1][0]",
        "znorm/test_training.py::test_two_processes_match_one_with_the_combined_batch",
    ),
    "tensors of one element": Guard(
        ZSCORE,
        'fewest = 1 if scope == "global" else 2',
        "fewest = 1",
        "znorm/test_zscore.py::test_a_single_element_passes_through_bit_for_bit",
    ),
    "a mean far beyond the spread": Guard(
        ZSCORE,
        "_CANCELS: Final = 0.25",
        "_CANCELS: Final = -1.0",
        "znorm/test_zscore.py::test_a_mean_far_beyond_the_spread_keeps_the_remaining_precision",
    ),
    "very small and very large numbers": Guard(
        ZSCORE,
        "    if not low < mean_square < high:",
        "    if False:",
        "znorm/test_zscore.py::test_values_of_any_magnitude_are_zscored",
    ),
    "constant gradients": Guard(
        ZSCORE,
        "    for _ in range(3):",
        "    for _ in range(1):",
        "znorm/test_zscore.py::test_a_constant_tensor_becomes_0",
    ),
    "biases in front of a norm": Guard(
        "znorm/select.py",
        "        if len(shape) < min_dimensions:",
        "        if False:",
        "znorm/test_select.py::test_no_bias_and_no_norm_is_normalised",
    ),
    "the output block": Guard(
        "znorm/select.py",
        '        if block is not None and name.startswith(f"{block}."):',
        "        if False:",
        "znorm/test_select.py::test_the_output_block_of_each_network_is_left_out",
    ),
    "wrapped models": Guard(
        "znorm/select.py",
        "        if len(children) > 1:",
        "        if True:",
        "znorm/test_select.py::test_a_wrapped_model_has_the_same_selection",
    ),
    "in-place operations after a place": Guard(
        BACKWARD,
        "return x.clone()",
        "return x.view_as(x)",
        "znorm/test_backward.py::test_an_in_place_activation_may_follow_a_place",
    ),
    "places in evaluation mode": Guard(
        BACKWARD,
        "    if not (module.training and torch.is_grad_enabled()):",
        "    if False:",
        "znorm/test_backward.py::test_nothing_happens_in_evaluation_mode_or_without_gradients",
    ),
    "places and batches of several sizes": Guard(
        BACKWARD,
        "factor / samples * math.sqrt(count)",
        "factor * math.sqrt(count)",
        "znorm/test_backward.py::test_micro_batches_add_up_to_the_combined_batch",
    ),
    "places and a scaled loss": Guard(
        "app/training/step.py",
        "state.scaler.get_scale() / settings.accumulate",
        "1.0",
        "app/training/test_recipe.py::test_backward_normalization_ignores_loss_scale_and_micro_batch_count",
    ),
    "the overlap at a place": Guard(
        "znorm/overlap.py",
        "junction.skip.register_forward_hook(partial(after_call, True), prepend=True)",
        "junction.skip.register_forward_hook(partial(after_call, True))",
        "znorm/test_backward.py::test_the_overlap_at_a_place_is_measured_on_one_side_only",
    ),
}
GUARDS |= TRAPS


def copy_of_the_program(place: Path) -> Path:
    for name in ("app", "data", "models", "znorm", "tests"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", place)
    return place


def pytest_in(place: Path, tests: list[str]) -> int:
    """Exit status of pytest over the program in a folder: 0 all passed, 1 some failed, more where it could not run."""
    environment = {**os.environ, "PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1"}
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    words += ["-m", "not gpu", *(f"tests/{test}" for test in tests)]  # some guards are tried by slow tests
    return subprocess.run(words, cwd=place, env=environment, capture_output=True, check=False, timeout=900).returncode


@pytest.mark.slow
def test_with_all_guards_every_test_passes(tmp_path: Path) -> None:
    place = copy_of_the_program(tmp_path / "program")
    assert pytest_in(place, sorted({guard.test for guard in GUARDS.values()})) == 0


@pytest.mark.slow
@pytest.mark.parametrize("guard", list(GUARDS.values()), ids=list(GUARDS))
def test_without_a_guard_its_test_fails(guard: Guard, tmp_path: Path) -> None:
    place = copy_of_the_program(tmp_path / "program")
    text = (place / guard.file).read_text(encoding="utf-8")
    (place / guard.file).write_text(text.replace(guard.code, guard.without), encoding="utf-8")
    assert pytest_in(place, [guard.test]) == 1


@pytest.mark.parametrize("guard", list(GUARDS.values()), ids=list(GUARDS))
def test_the_guard_to_be_removed_exists(guard: Guard) -> None:
    assert (ROOT / guard.file).read_text(encoding="utf-8").count(guard.code) >= 1
