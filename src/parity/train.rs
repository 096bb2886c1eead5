//! `train.*`: some optimizer steps of a whole model, from the accumulated gradients to the final weights.

use super::case::Case;
use super::compare::Tolerance;
use super::fixture::Tensors;
use super::model::{Batch, accumulate, build};
use super::recipe::{checked, recipe};
use crate::error::{Error, Result};
use crate::host::HostTensor;
use crate::model::Model;
use crate::ops::{Base, Plain};
use crate::optim::averages::Averages;
use crate::optim::schedule::{lr_multiplier, muon_momentum};
use crate::optim::{Group, Optimizers, Rounding, group_of};
use crate::recipe::{PR1382, PR1607, PR1994, Recipe};
use burn::tensor::DType;
use std::collections::BTreeSet;

/// What follows from the step's number alone is exact but for the order of a few operations.
const SCHEDULE_TOLERANCE: f64 = 1e-12;

/// The optimizers' and schedules' numbers.
const HYPER: [&str; 16] = [
    "adam_eps",
    "backend_steps",
    "beta1",
    "beta2",
    "clip",
    "grad_accum",
    "head_lr",
    "iterations",
    "matrix_lr",
    "momentum_start",
    "momentum_warmup_steps",
    "muon_momentum",
    "scalar_lr",
    "steps",
    "tok_lr",
    "warmdown_iters",
];

/// What only some systems' training has.
const OPTIONS: [&str; 7] =
    ["adam_wd", "ema", "ema_offset", "lr_warmup_steps", "mamba_matrix_lr", "muon_wd", "recur_from"];

/// Runs the steps of `in.ids[step, micro-batch, b, t]` from `param0.*`.
///
/// A file `*_f32` has no inputs of its own: they are in its sibling `*_f64`. Its numbers are those of a float32 run and
/// are compared absolutely.
pub(super) fn train<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    set_tolerances(case)?;
    let sibling = match case.name.strip_suffix("_f32") {
        Some(stem) if case.tensors.peek("in.ids").is_none() => {
            Some(Tensors::load(&case.dir.join(format!("{stem}_f64.safetensors")))?)
        }
        _ => None,
    };
    // A sibling lends its inputs for the run; only this file's own tensors are compared.
    let own = sibling.map(|inputs| std::mem::replace(&mut case.tensors, inputs));
    let run = Run::new(case);
    if let Some(own) = own {
        case.tensors = own;
    }
    run?.steps(case)
}

/// Float64 runs: `tol` for what the file holds in float64, `tol_rounded` for what it holds in float32. Narrower ones:
/// the absolute bounds of the float32 run, the entry's own or its sibling's.
fn set_tolerances<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let top = case.entry.top();
    let is_float32 = top.number("tol")?.is_none() && top.number("tol_abs_params")?.is_some();
    if is_float32 && case.dtype == DType::F64 {
        case.dtype = DType::F32;
    }
    if case.dtype == DType::F64 {
        let rounded = match top.number("tol_rounded")? {
            Some(_) => case.entry.bound("tol_rounded")?,
            None => case.entry.bound("tol")?,
        };
        for prefix in ["grad0.", "after1."] {
            case.tolerate(prefix, Tolerance::Relative(rounded));
        }
        return Ok(());
    }
    if top.number("tol_f32")?.is_some() {
        return Ok(());
    }
    let stem = case.name.strip_suffix("_f64").unwrap_or(case.name);
    let sibling = || case.index.get(&format!("{stem}_f32"));
    let Some(entry) = is_float32.then_some(case.entry).or_else(sibling) else { return Ok(()) };
    let bound = |key| Ok(Tolerance::Absolute(entry.bound(key)?));
    let [params, losses] = [bound("tol_abs_params")?, bound("tol_abs_losses")?];
    case.tolerate("", params);
    case.tolerate("out.", losses);
    Ok(())
}

/// A model before its first step, and what it trains on.
struct Run<P: Plain> {
    recipe: Recipe,
    recur_from: Option<usize>,
    model: Model<P>,
    sizes: [usize; 4],
    ids: Vec<i64>,
    targets: Vec<i64>,
}

impl<P: Plain> Run<P> {
    fn new(case: &Case<'_, P>) -> Result<Self> {
        let &[steps, spans, batch, time] = case.host("in.ids")?.shape.as_slice() else {
            return Err(Error::input("in.ids", "the file", "[step, micro-batch, batch, time]"));
        };
        let sizes = [steps, spans, batch, time];
        let mut recipe = recipe(case, [spans, batch, time])?;
        set_hyper(case, &mut recipe, steps)?;
        let recur_from = case.entry.section("hyper")?.count("recur_from")?;
        let recipe = checked(recipe, "hyper")?;
        case.expect_shape("in.targets", &sizes)?;
        let (ids, _) = case.ids("in.ids", recipe.vocab_size)?;
        let (targets, _) = case.ids("in.targets", recipe.vocab_size)?;
        let model = build(case, &recipe, &case.tensors, "param0.")?;
        Ok(Self { recipe, recur_from, model, sizes, ids, targets })
    }

    fn batch<B: Base<Plain = P>>(&self, step: usize, span: usize, device: &B::Device) -> Batch<B> {
        let [_, spans, batch, time] = self.sizes;
        let start = (step * spans + span) * batch * time;
        let range = start..start + batch * time;
        super::model::batch::<B>([&self.ids[range.clone()], &self.targets[range]], [batch, time], device)
    }

    fn steps(self, case: &mut Case<'_, P>) -> Result<()> {
        let [steps, spans, ..] = self.sizes;
        let (recipe, model) = (&self.recipe, &self.model);
        check_groups(case, recipe, model)?;
        let rounding = Rounding { newton_schulz: case.entry.says("bfloat16"), storage: false };
        let mut optimizers = Optimizers::with_rounding(recipe, model, rounding);
        let mut averages = Averages::new(recipe, model, false);
        let (mut losses, mut muls, mut momenta) = (Vec::new(), Vec::new(), Vec::new());
        for step in 0..steps {
            model.set_recurrent(self.recur_from.is_some_and(|from| step >= from));
            let mut mean = 0.0;
            for span in 0..spans {
                mean += scalar(accumulate(model, self.batch::<P>(step, span, case.device), spans))?;
            }
            losses.push(mean);
            if step == 0 {
                let scale = optimizers.clip_scale();
                let clipped = |grad| match &scale {
                    Some(scale) => grad * scale.clone(),
                    None => grad,
                };
                for grad in model.params().read(&|param| param.flat_grad().map(clipped))? {
                    case.give_host(HostTensor { name: format!("grad0.{}", grad.name), ..grad });
                }
            }
            muls.push(lr_multiplier(recipe, step, 0.0));
            momenta.push(muon_momentum(recipe, step));
            optimizers.step(muls[step], momenta[step]);
            averages.update(step + 1, muls[step]);
            if step == 0 {
                give_params(case, model, "after1.")?;
            }
        }
        give_params(case, model, "final.")?;
        for average in model.params().read(&|param| averages.average(param.name()))? {
            case.give_host(HostTensor { name: format!("ema.{}", average.name), ..average });
        }
        case.give_host(HostTensor::from_f64("out.losses", &[steps], &losses));
        let last = accumulate(model, self.batch::<P>(0, 0, case.device), 1);
        case.give("out.final_loss", &[1], Some(last))?;
        model.params().clear_grads();
        check_schedule(case, "lr_mul", &muls)?;
        check_schedule(case, "muon_momentum", &momenta)
    }
}

fn scalar<P: Plain>(value: burn::tensor::Tensor<P, 1>) -> Result<f64> {
    let host = crate::model::params::to_host("loss", &[1], value)?;
    Ok(host.to_f64().iter().sum())
}

fn give_params<P: Plain>(case: &mut Case<'_, P>, model: &Model<P>, prefix: &str) -> Result<()> {
    for tensor in model.params().to_host()? {
        case.give_host(HostTensor { name: format!("{prefix}{}", tensor.name), ..tensor });
    }
    Ok(())
}

/// Takes the entry's `hyper` into the recipe: a schedule by steps, one token rate whether tied or not.
fn set_hyper<P: Plain>(case: &Case<'_, P>, recipe: &mut Recipe, steps: usize) -> Result<()> {
    let hyper = case.entry.section("hyper")?;
    hyper.only(&[HYPER.as_slice(), &OPTIONS].concat())?;
    set_options(case, recipe)?;
    for (key, found) in [("steps", steps), ("grad_accum", recipe.grad_accum_steps)] {
        if hyper.count(key)? != Some(found) {
            return Err(Error::input(format!("another {key} than in.ids has"), "hyper", found));
        }
    }
    let count = |key| hyper.count(key)?.ok_or_else(|| Error::input(format!("no {key}"), "hyper", "a number"));
    recipe.max_wallclock_seconds = 0.0;
    recipe.iterations = count("iterations")?;
    recipe.warmdown_iters = count("warmdown_iters")?;
    recipe.muon_backend_steps = count("backend_steps")?;
    recipe.muon_momentum_warmup_steps = count("momentum_warmup_steps")?;
    recipe.muon_momentum_warmup_start = hyper.needed("momentum_start")?;
    recipe.muon_momentum = hyper.needed("muon_momentum")?;
    recipe.tied_embed_lr = hyper.needed("tok_lr")?;
    recipe.embed_lr = recipe.tied_embed_lr;
    recipe.matrix_lr = hyper.needed("matrix_lr")?;
    recipe.scalar_lr = hyper.needed("scalar_lr")?;
    if !recipe.tie_embeddings {
        recipe.head_lr = hyper.needed("head_lr")?;
    }
    recipe.beta1 = hyper.needed("beta1")?;
    recipe.beta2 = hyper.needed("beta2")?;
    recipe.adam_eps = hyper.needed("adam_eps")?;
    recipe.grad_clip_norm = hyper.number("clip")?.unwrap_or(0.0);
    Ok(())
}

/// Takes what only some systems have. One that the entry's system has not may be there as 0.
fn set_options<P: Plain>(case: &Case<'_, P>, recipe: &mut Recipe) -> Result<()> {
    let hyper = case.entry.section("hyper")?;
    let number = |key: &str| Ok::<_, Error>(hyper.number(key)?.unwrap_or(0.0));
    let system = recipe.system.clone();
    let has = |key: &str| match key {
        "ema" => system.as_str() != "challenge",
        "adam_wd" | "mamba_matrix_lr" => system == PR1382,
        "muon_wd" => system == PR1607 || system == PR1382,
        "recur_from" => system == PR1607,
        "ema_offset" => system == PR1994,
        _ => true,
    };
    for key in OPTIONS {
        if !has(key) && number(key)? != 0.0 {
            return Err(Error::input(format!("{key} is set"), "hyper", format!("0 or nothing in {system}")));
        }
    }
    recipe.lr_warmup_steps = hyper.count("lr_warmup_steps")?.unwrap_or(0);
    match system.as_str() {
        PR1994 => {
            recipe.ema_beta = number("ema")?;
            recipe.ema_warmup_offset = Some(hyper.count("ema_offset")?.unwrap_or(0));
        }
        PR1607 => {
            (recipe.ema_decay, recipe.weight_decay) = (number("ema")?, number("muon_wd")?);
            recipe.ema_enabled = recipe.ema_decay > 0.0;
        }
        PR1382 => {
            (recipe.ema_decay, recipe.muon_wd, recipe.adam_wd) =
                (number("ema")?, number("muon_wd")?, number("adam_wd")?);
            recipe.mamba_matrix_lr = hyper.needed("mamba_matrix_lr")?;
        }
        _ => {}
    }
    Ok(())
}

/// Compares which optimizer has which parameter, where the entry says it. An untied head is in no list of the peers'.
fn check_groups<P: Plain>(case: &mut Case<'_, P>, recipe: &Recipe, model: &Model<P>) -> Result<()> {
    let groups = case.entry.section("groups")?;
    // The peers' names: a bank stands for its matrices.
    let names_of = |wanted: &[Group]| -> BTreeSet<String> {
        let specs = model.plan().specs.iter();
        let chosen = specs.filter(|spec| wanted.contains(&group_of(recipe, &spec.name, spec.shape.len())));
        let bank = |name: &str| model.params().bank_of(name).map(|bank| bank.name.clone());
        chosen.map(|spec| bank(&spec.name).unwrap_or_else(|| spec.name.clone())).collect()
    };
    let named = model.plan().layout();
    for (key, wanted) in [
        ("adam_tok", [Group::Embedding]),
        ("adam_scalar", [Group::Scalar]),
        ("muon", [Group::Matrix]),
        ("muon_group2", [Group::MambaMatrix]),
    ] {
        let Some(theirs) = groups.texts(key)? else { continue };
        let theirs: BTreeSet<&str> = theirs.into_iter().collect();
        let ours = names_of(&wanted);
        let ours: BTreeSet<&str> = ours.iter().map(String::as_str).collect();
        // A parameter without elements is in a list of the peers' and not in our model.
        let exists = |name: &&&str| named.iter().any(|(own, _)| own == *name);
        let differ: Vec<&str> = theirs.symmetric_difference(&ours).filter(exists).copied().collect();
        case.fact(
            format!("groups.{key}"),
            differ.len() as f64,
            0.0,
            Some(format!("differ: {}", differ.join(", "))),
        );
    }
    Ok(())
}

/// Compares a value of every step with the entry's list of it.
fn check_schedule<P: Plain>(case: &mut Case<'_, P>, key: &str, ours: &[f64]) -> Result<()> {
    let Some(theirs) = case.entry.top().numbers(key)? else { return Ok(()) };
    if theirs.len() != ours.len() {
        return Err(Error::input(format!("{} values of {key}", theirs.len()), "the entry", ours.len()));
    }
    let error = ours.iter().zip(&theirs).fold(0.0f64, |worst, (a, b)| worst.max((a - b).abs()));
    case.fact(key.into(), error, SCHEDULE_TOLERANCE, Some(format!("{ours:?}, expected {theirs:?}")));
    Ok(())
}
