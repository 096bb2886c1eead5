//! `quant.pack_ternary_1994`: matrices as packed ternary codes, and back.

use super::super::case::Case;
use super::super::compare::Tolerance;
use super::{finite, narrow};
use crate::error::Result;
use crate::host::{HostTensor, HostType};
use crate::ops::Plain;
use crate::quant::ternary::{Packing, Ternary};

/// Each `in.w.NAME`: its packed codes, the mean magnitude gamma, and the restored weights.
///
/// Gamma is a sum in another order than the peer's, within the entry's `tol_gamma`. Restoring starts from packed codes and a gamma:
/// here from the peer's, so that it must give the same weights.
pub(in crate::parity) fn pack_ternary<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    case.entry.section("config")?.only(&[])?;
    if case.entry.top().number("tol_gamma")?.is_some() {
        case.tolerate("out.gamma.", Tolerance::Relative(case.entry.bound("tol_gamma")?));
    }
    let names: Vec<String> =
        case.tensors.iter().filter_map(|(name, _)| Some(name.strip_prefix("in.w.")?.to_string())).collect();
    for name in names {
        let weights = case.host(&format!("in.w.{name}"))?.clone();
        let ternary = Ternary::bit_linear(&narrow(&finite(&weights)?));
        let bytes = Packing::TwoBits.pack(&ternary.codes);
        case.give_host(HostTensor {
            name: format!("out.packed.{name}"),
            shape: vec![bytes.len()],
            dtype: HostType::U8,
            bytes,
        });
        let gamma = format!("out.gamma.{name}");
        let theirs = case.tensors.peek(&gamma).and_then(|gamma| gamma.to_f64().first().copied());
        case.give_host(HostTensor::from_f64(gamma, &[1], &[ternary.gamma.into()]));
        let packed = Ternary { gamma: theirs.map_or(ternary.gamma, |gamma| gamma as f32), ..ternary };
        case.give_host(HostTensor::from_f32(
            format!("out.unpacked.{name}"),
            &weights.shape,
            &packed.restore(),
        ));
    }
    Ok(())
}
