"""What to use instead of a name that only Lightning has: for whole modules, and for names of their own.

`xtrain.compat.imports` reads both tables. A name that xtrain has is found before them.
"""

from __future__ import annotations

_BACKEND = "Trainer(backend='cuda'); `xtrain backends` lists all"
_LAUNCH = "nothing: xtrain finds its launcher by itself (torchrun, accelerate, SLURM: docs/launch.md)"
_LOOP = "trainer.current_epoch, trainer.global_step, trainer.should_stop; the loop is xtrain/trainer.py"
_PRECISION = "Trainer(precision='16-mixed', scaler_kwargs={'init_scale': 2.0**12})"
_PROFILER = "torch.profiler.profile() around trainer.fit(...)"
_SWEEP = "a loop of your own over Trainer(max_steps=100).fit(Model(lr=lr), loader)"
_SUMMARY = "xtrain.callbacks.ModelSummary"
_WARNINGS = "warnings.warn(...), logging.getLogger(...) of the standard library"
_WRITTEN_OUT = "a class of your own, derived from xtrain.LightningModule"

# Modules of Lightning, without ``lightning.pytorch.``. None: xtrain has this module, other names are misspelled.
PLACES: dict[str, str | None] = {
    "": None,
    **dict.fromkeys(("accelerators", "strategies"), _BACKEND),
    **{f"accelerators.{name}": _BACKEND for name in ("accelerator", "cpu", "cuda", "mps", "xla")},
    "callbacks": None,
    **{
        f"callbacks.{name}": "a class derived from xtrain.Callback"
        for name in (
            "batch_size_finder", "callback", "checkpoint", "device_stats_monitor", "early_stopping", "finetuning",
            "gradient_accumulation_scheduler", "lambda_function", "lr_finder", "lr_monitor", "model_checkpoint",
            "model_summary", "on_exception_checkpoint", "prediction_writer", "progress.progress_bar",
            "progress.rich_progress", "progress.tqdm_progress", "pruning", "rich_model_summary", "spike",
            "stochastic_weight_avg", "throughput_monitor", "timer", "weight_averaging",
        )
    },
    "callbacks.progress": None,
    "cli": None,
    "core": None,
    **dict.fromkeys(("core.datamodule", "core.hooks", "core.mixins", "core.module", "core.optimizer"), None),
    "core.mixins.hparams_mixin": "xtrain.LightningModule, which has save_hyperparameters",
    "core.saving": "self.save_hyperparameters() and Trainer(logger=True), which writes them to a file",
    **dict.fromkeys(("demos", "demos.boring_classes", "demos.lstm", "demos.mnist_datamodule"), _WRITTEN_OUT),
    "demos.transformer": _WRITTEN_OUT,
    "fabric": "xtrain.Trainer; for a loop of your own the package accelerate",
    "loggers": None,
    **{
        f"loggers.{name}": "a class derived from xtrain.loggers.Logger"
        for name in ("comet", "csv_logs", "litlogger", "logger", "mlflow", "neptune", "utilities", "wandb")
    },
    "loggers.tensorboard": None,
    "loops": _LOOP,
    **{
        f"loops.{name}": _LOOP
        for name in (
            "evaluation_loop", "fetchers", "fit_loop", "loop", "optimization", "optimization.automatic",
            "optimization.closure", "optimization.manual", "prediction_loop", "progress", "training_epoch_loop",
            "utilities",
        )
    },
    **dict.fromkeys(("overrides", "overrides.distributed"), "nothing: a DataLoader is split over the processes"),
    "plugins": "arguments of the Trainer and of the backend: precision=..., backend_options={...}",
    "plugins.environments": _LAUNCH,
    **{f"plugins.io{name}": "trainer.save_checkpoint" for name in ("", ".async_plugin", ".checkpoint_plugin")},
    **{f"plugins.io.{name}": "trainer.save_checkpoint" for name in ("torch_plugin", "wrapper", "xla_plugin")},
    "plugins.layer_sync": "torch.nn.SyncBatchNorm.convert_sync_batchnorm(network) in __init__",
    "plugins.precision": _PRECISION,
    **{
        f"plugins.precision.{name}": _PRECISION
        for name in (
            "amp", "bitsandbytes", "deepspeed", "double", "fsdp", "half", "precision", "transformer_engine", "xla",
        )
    },
    "profilers": _PROFILER,
    **{f"profilers.{name}": _PROFILER for name in ("advanced", "base", "profiler", "pytorch", "simple", "xla")},
    "serve": "torch.export.export(module, ...) and a server of your choice",
    **{
        f"strategies.{name}": _BACKEND
        for name in (
            "ddp", "deepspeed", "fsdp", "launchers", "launchers.launcher", "launchers.multiprocessing",
            "launchers.subprocess_script", "launchers.xla", "model_parallel", "parallel", "single_device",
            "single_xla", "strategy", "xla",
        )
    },
    "trainer": None,
    **{
        f"trainer.{name}": "the public attributes of xtrain.Trainer"
        for name in (
            "call", "configuration_validator", "connectors", "connectors.accelerator_connector",
            "connectors.callback_connector", "connectors.checkpoint_connector", "connectors.data_connector",
            "connectors.logger_connector", "connectors.logger_connector.fx_validator",
            "connectors.logger_connector.logger_connector", "connectors.logger_connector.result",
            "connectors.signal_connector", "setup", "states", "trainer",
        )
    },
    **{f"tuner{name}": _SWEEP for name in ("", ".batch_size_scaling", ".lr_finder", ".tuning")},
    "utilities": None,
    **dict.fromkeys(("utilities.combined_loader", "utilities.grads", "utilities.seed", "utilities.types"), None),
    "utilities.argparse": "argparse of the standard library",
    "utilities.compile": "module = torch.compile(module); module._orig_mod is the module that was compiled",
    "utilities.consolidate_checkpoint": "torch.distributed.checkpoint.format_utils",
    "utilities.data": "len(batch), batch.size(0)",
    "utilities.deepspeed": "Trainer(backend='deepspeed', backend_options={'stage': 3})",
    "utilities.enums": "the plain strings: 'norm', 'value'",
    "utilities.exceptions": "the errors of xtrain.errors, all derived from xtrain.XTrainError",
    "utilities.imports": "importlib.util.find_spec('package') is not None",
    "utilities.memory": "torch.cuda.empty_cache(), tensor.detach().cpu()",
    **{f"utilities.migration{name}": "torch.load(path)" for name in ("", ".migration", ".utils")},
    "utilities.model_helpers": "type(module).method is not xtrain.LightningModule.method",
    "utilities.model_registry": "a path of a file",
    "utilities.model_summary": _SUMMARY,
    **{f"utilities.model_summary.{name}": _SUMMARY for name in ("model_summary", "model_summary_deepspeed")},
    "utilities.parameter_tying": "nothing: tied parameters stay tied",
    "utilities.parsing": "inspect.signature, vars(...)",
    "utilities.rank_zero": _WARNINGS,
    "utilities.signature_utils": "inspect.signature(function).parameters",
    "utilities.testing": "pytest.mark.skipif",
    "utilities.upgrade_checkpoint": "torch.load(path)",
    "utilities.warnings": _WARNINGS,
}  # fmt: skip

HINTS: dict[str, str] = {
    **dict.fromkeys(("BackboneFinetuning", "BaseFinetuning"), "parameter.requires_grad_(False) in on_fit_start"),
    **dict.fromkeys(("BatchSizeFinder", "LearningRateFinder"), _SWEEP),
    **dict.fromkeys(("Checkpoint", "OnExceptionCheckpoint"), "ModelCheckpoint(save_on_exception=True)"),
    "StochasticWeightAveraging": "xtrain.callbacks.WeightAveraging, with should_update(...) of your own",
    **dict.fromkeys(("RichModelSummary",), "xtrain.callbacks.ModelSummary"),
    **dict.fromkeys(("CometLogger", "LitLogger", "NeptuneLogger"),
                    "a class derived from xtrain.loggers.Logger, with log_metrics(metrics, step)"),
    "CheckpointHooks": "LightningModule.on_save_checkpoint and on_load_checkpoint",
    "DeviceStatsMonitor": "self.log('memory', float(torch.cuda.max_memory_allocated())) in training_step",
    "LightningArgumentParser": "jsonargparse.ArgumentParser, which xtrain.cli.LightningCLI uses",
    **dict.fromkeys(("instantiate_class", "instantiate_module"), "parser.instantiate(config) of jsonargparse"),
    "Fabric": "xtrain.Trainer; for a loop of your own the package accelerate",
    "GradientAccumulationScheduler": "Trainer(accumulate_grad_batches=4), or manual optimization",
    "ModelPruning": "torch.nn.utils.prune in on_train_epoch_end",
    "SpikeDetection": "Trainer(nonfinite_loss='stop')",
    "ThroughputMonitor": "time.perf_counter() in on_train_batch_end",
    "disable_possible_user_warnings": "warnings.filterwarnings('ignore', module='xtrain')",
    "do_nothing_closure": "lambda: None",
    "find_shared_parameters": "nothing: tied parameters stay tied",
    "find_usable_cuda_devices": "CUDA_VISIBLE_DEVICES=0,1 in the environment",
    "is_picklable": "pickle.dumps(value)",
    "is_shared_filesystem": "a path that all hosts see",
    "measure_flops": "torch.utils.flop_counter.FlopCounterMode()",
    "set_shared_parameters": "nothing: tied parameters stay tied",
    "suggested_max_num_workers": "os.cpu_count() // trainer.world_size",
    "GradClipAlgorithmType": "the plain strings: 'norm', 'value'",
    "LightningEnum": "enum.StrEnum, or class Name(str, enum.Enum)",
}  # fmt: skip
