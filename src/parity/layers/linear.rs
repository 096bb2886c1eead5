//! Linear layers in their forms, and MLPs of them.

use super::{TERNARY, Tape, matrix_shape, params, run_layer, width};
use crate::error::Result;
use crate::model::init::Init;
use crate::model::mlp::{Mlp, MlpForm, MlpPlan};
use crate::model::spec::{Linears, Spec};
use crate::ops::weight_form::WeightForm;
use crate::ops::{LinearOps, Plain};
use crate::parity::case::Case;

/// `op.*_mlp`: an MLP of two or three matrices, among the inputs or the parameters.
fn mlp_of<P: Plain>(
    case: &mut Case<'_, P>,
    form: MlpForm,
    linears: Linears,
    names: &'static [(&'static str, &'static str)],
) -> Result<()> {
    let dim = width(case)?;
    let hidden = matrix_shape(case, names[0].1)?[0];
    let plan = MlpPlan { prefix: "mlp".into(), dim, hidden, form };
    let find =
        |name: &str| names.iter().find(|(own, _)| *own == name).map_or(name, |(_, file)| *file).to_string();
    let params = params(case, &plan.specs(linears), find)?;
    let mlp = Mlp::new(&plan, &params);
    let grad = |name: &str| {
        let file = find(name);
        format!("grad.{}", file.split_once('.').map_or(file.as_str(), |(_, own)| own))
    };
    run_layer(case, &params, grad, |x, _| mlp.forward(x))
}

const SQUARED_INPUTS: &[(&str, &str)] = &[("mlp.fc.weight", "in.w_up"), ("mlp.proj.weight", "in.w_down")];
const SQUARED_PARAMS: &[(&str, &str)] =
    &[("mlp.fc.weight", "param.fc.weight"), ("mlp.proj.weight", "param.proj.weight")];
const GATED_INPUTS: &[(&str, &str)] =
    &[("mlp.w_gate.weight", "in.w_gate"), ("mlp.w_up.weight", "in.w_up"), ("mlp.w_down.weight", "in.w_down")];
const GATED_PARAMS: &[(&str, &str)] = &[
    ("mlp.w_gate.weight", "param.w_gate.weight"),
    ("mlp.w_up.weight", "param.w_up.weight"),
    ("mlp.w_down.weight", "param.w_down.weight"),
];

/// `relu(x w_up^T)^2 w_down^T`.
pub(in crate::parity) fn relu_squared_mlp<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["form"])?;
    config.formula("form", "relu(x Wu^T)^2 Wd^T")?;
    mlp_of(case, MlpForm::Squared(0.0), Linears::PLAIN, SQUARED_INPUTS)
}

/// `leaky_relu(x w_up^T, slope)^2 w_down^T`.
pub(in crate::parity) fn leaky_mlp<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["form", "slope"])?;
    config.formula("form", "leaky_relu(x Wu^T, slope)^2 Wd^T")?;
    mlp_of(case, MlpForm::Squared(config.needed("slope")?), Linears::PLAIN, SQUARED_INPUTS)
}

/// The same with PR #1607's slope of 0.5 and names.
pub(in crate::parity) fn leaky_mlp_1607<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    case.entry.section("config")?.only(&[])?;
    mlp_of(case, MlpForm::Squared(0.5), Linears::PLAIN, SQUARED_PARAMS)
}

/// `(silu(x w_gate^T) (x w_up^T)) w_down^T`.
pub(in crate::parity) fn swiglu_mlp<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["form"])?;
    config.formula("form", "(silu(x Wg^T) * (x Wu^T)) Wd^T")?;
    mlp_of(case, MlpForm::SwiGlu, Linears::PLAIN, GATED_INPUTS)
}

/// The same with ternary weights.
pub(in crate::parity) fn swiglu_ternary<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    case.entry.section("config")?.only(&[])?;
    mlp_of(case, MlpForm::SwiGlu, TERNARY, GATED_PARAMS)
}

/// A linear layer with ternary weights.
pub(in crate::parity) fn bit_linear<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    case.entry.section("config")?.only(&[])?;
    let shape = matrix_shape(case, "param.weight")?;
    let params = params(case, &[TERNARY.weight("w", shape)], |_| "param.weight".into())?;
    let weight = params.iter().next().cloned().expect("one parameter");
    run_layer(case, &params, |_| "grad.weight".into(), |x, _| Tape::<P>::project(x, &weight))
}

/// A linear layer with weights that training quantises, in PR #1607's form and PR #1382's (there not in evaluation).
fn fake_int6<P: Plain>(case: &mut Case<'_, P>, form: WeightForm) -> Result<()> {
    case.entry.section("config")?.only(&[])?;
    let shape = matrix_shape(case, "in.w")?;
    let spec = Spec { form, ..Spec::new("w", &shape, Init::Linear) };
    let params = params(case, &[spec], |_| "in.w".into())?;
    let weight = params.iter().next().cloned().expect("one parameter");
    case.give("out.wq", &shape, Some(weight.compute::<2>()))?;
    if case.tensors.peek("out.y_eval").is_some() {
        weight.set_form(WeightForm::Full);
        let (x, mut shape) = case.matrix("in.x")?;
        let y = P::project(x, &weight);
        shape.pop();
        shape.push(y.dims()[1]);
        case.give("out.y_eval", &shape, Some(y))?;
        weight.set_form(form);
    }
    run_layer(case, &params, |_| "grad.w".into(), |x, _| Tape::<P>::project(x, &weight))
}

/// PR #1607's.
pub(in crate::parity) fn fake_int6_1607<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    fake_int6(case, WeightForm::fake_int_symmetric(6))
}

/// PR #1382's.
pub(in crate::parity) fn fake_int6_1382<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    fake_int6(case, WeightForm::fake_int6_asymmetric())
}
