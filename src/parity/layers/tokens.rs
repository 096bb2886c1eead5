//! What comes between the tokens and the blocks: hashed tables, and smear gates.

use super::{Tape, give_grads, params, run_layer, size, width, without};
use crate::error::{Error, Result};
use crate::host::HostTensor;
use crate::model::embed::{Embed, EmbedPlan, HashPlan, smear};
use crate::model::init::Init;
use crate::model::spec::{Linears, Spec};
use crate::ops::Plain;
use crate::ops::hash::Hash;
use crate::ops::rms_norm::EPS;
use crate::parity::case::{Case, integers};
use burn::tensor::{Int, Tensor};

fn smear_of<P: Plain>(case: &mut Case<'_, P>, own: bool) -> Result<()> {
    case.entry.section("config")?.only(&[])?;
    let dim = width(case)?;
    let params = params(case, &[Spec::new("gate", &[dim], Init::Constant(0.0))], |_| "param.gate".into())?;
    let gate = params.iter().next().cloned().expect("one parameter");
    run_layer(case, &params, |_| "grad.gate".into(), |x, batch| smear(x, &gate, batch, own, None))
}

/// PR #1607's smear gate: on the row itself.
pub(in crate::parity) fn smear_1607<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    smear_of(case, true)
}

/// PR #1382's: on the row before.
pub(in crate::parity) fn smear_1382<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    smear_of(case, false)
}

/// A hashed table on `in.ids[b, t]`; `in.x` is not used and its gradient is 0.
fn hashed<P: Plain>(case: &mut Case<'_, P>, hash: Hash, triples: bool) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["buckets", "d", "dim", "vocab"])?;
    let (buckets, dim) = (size(config, "buckets")?, size(config, "d")?);
    let (width, vocab) = (size(config, "dim")?, size(config, "vocab")?);
    let table = if hash == Hash::Product { "table" } else { "embed" };
    let plan = HashPlan { prefix: "hash", table, hash, triples, buckets, width, scaled: hash == Hash::Xor };
    let plan = EmbedPlan { vocab, dim, std: 0.0, hash: Some(plan), smear: None, values: None, rms_eps: EPS };
    let specs = plan.hash_specs(Linears::PLAIN, Init::Linear, Init::Linear);
    let params = params(case, &specs, without("hash", "param"))?;
    let (ids, shape) = case.ids("in.ids", vocab)?;
    let &[batch, time] = shape.as_slice() else {
        return Err(Error::input("in.ids is no matrix", "the file", "[batch, time]"));
    };
    let ids = integers::<Tape<P>, 2>(ids, [batch, time], case.device);
    let y = Embed::hashed(&plan, &params, ids);
    let out = [batch, time, dim];
    case.expect_shape("cot.y", &out)?;
    let (cot, _) = case.matrix("cot.y")?;
    case.give("out.y", &out, Some(y.clone().inner()))?;
    (y * Tensor::from_inner(cot)).backward();
    if case.tensors.input("in.x").is_some() {
        let (x, shape) = case.flat("in.x")?;
        case.give("grad.x", &shape, Some(x.zeros_like()))?;
    }
    give_grads(case, &params, without("hash", "grad"))
}

/// PR #1607's table.
pub(in crate::parity) fn hashed_1607<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    hashed(case, Hash::Product, false)
}

/// PR #1382's table.
pub(in crate::parity) fn hashed_1382<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    hashed(case, Hash::Xor, false)
}

/// PR #1382's table with triples.
pub(in crate::parity) fn hashed_1382_triples<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    hashed(case, Hash::Xor, true)
}

/// The rows of hashed tables: `in.ids.NAME_bROWS[b, t]` to `out.HASH.NAME_bROWS`.
pub(in crate::parity) fn hash_ids<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    case.entry.section("config")?.only(&[])?;
    let names: Vec<String> =
        case.tensors.iter().filter_map(|(name, _)| name.strip_prefix("in.ids.")).map(String::from).collect();
    for name in names {
        let buckets: Option<usize> = name.rsplit_once("_b").and_then(|(_, rows)| rows.parse().ok());
        let Some(buckets) = buckets.filter(|rows| (1..=crate::recipe::MOST_BUCKETS).contains(rows)) else {
            return Err(Error::input(format!("in.ids.{name}"), "the file", "a name that ends in _bROWS"));
        };
        let (ids, shape) = case.ids(&format!("in.ids.{name}"), 65_536)?;
        let &[batch, time] = shape.as_slice() else {
            return Err(Error::input(format!("in.ids.{name}"), "the file", "[batch, time]"));
        };
        let ids = integers::<P, 2>(ids, [batch, time], case.device);
        for (system, hash, triple) in [
            ("pr1607", Hash::Product, false),
            ("pr1382_bigram", Hash::Xor, false),
            ("pr1382_trigram", Hash::Xor, true),
        ] {
            let rows: Tensor<P, 2, Int> = hash.buckets(ids.clone(), None, 0, buckets, triple);
            let rows = rows.into_data().iter::<i64>().map(|row| row as f64).collect::<Vec<_>>();
            case.give_host(HostTensor::from_f64(format!("out.{system}.{name}"), &shape, &rows));
        }
    }
    Ok(())
}
