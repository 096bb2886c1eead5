//! `quant.int6_clip_search`: rows of matrices and a vector, with and without the search for a clip.

use super::super::case::Case;
use super::{codes, finite, half_scales, matrix, narrow};
use crate::error::{Error, Result};
use crate::host::HostTensor;
use crate::ops::Plain;
use crate::quant::clip::{BITS, Rule};

/// The bits of PR #1382's codes, of vectors', and of what the entry does not say otherwise.
const USUAL_BITS: u32 = 6;

/// Each `in.w.I` by PR #1607's rule with `search0` and `search1`, in `cases[I].bits` bits, and by PR #1382's; `in.vec`
/// by the former with one scale.
pub(in crate::parity) fn clip_search<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    case.entry.section("config")?.only(&[])?;
    let numbers: Vec<String> =
        case.tensors.iter().filter_map(|(name, _)| Some(name.strip_prefix("in.w.")?.to_string())).collect();
    for number in numbers {
        let (weights, [rows, columns]) = matrix(case, &format!("in.w.{number}"))?;
        let weights = narrow(&weights);
        let bits = bits(case, &number)?;
        let searches = [("search0", Rule::Challenge), ("search1", Rule::Pr1607)].map(|(search, rule)| {
            (format!("out.q.{number}.{search}"), format!("out.scale.{number}.{search}"), rule, bits)
        });
        let of_1382 =
            (format!("out.q1382.{number}"), format!("out.scale1382.{number}"), Rule::Pr1382, USUAL_BITS);
        for (q, scale, rule, bits) in searches.into_iter().chain([of_1382]) {
            let coded = rule.rows(&weights, columns, bits);
            case.give_host(codes(q, &[rows, columns], &coded.codes));
            case.give_host(half_scales(scale, &coded.scales));
        }
    }
    if case.tensors.peek("in.vec").is_some() {
        let vector = case.host("in.vec")?.clone();
        let weights = narrow(&finite(&vector)?);
        for (search, rule) in [("search0", Rule::Challenge), ("search1", Rule::Pr1607)] {
            let coded = rule.whole(&weights, USUAL_BITS);
            case.give_host(codes(format!("out.vec_q.{search}"), &vector.shape, &coded.codes));
            case.give_host(HostTensor::from_f32(format!("out.vec_scale.{search}"), &[], &coded.scales));
        }
    }
    Ok(())
}

/// The bits of a numbered matrix.
fn bits<P: Plain>(case: &Case<'_, P>, number: &str) -> Result<u32> {
    let listed =
        case.entry.top().get("cases").and_then(|cases| cases.get(number.parse::<usize>().ok()?)?.get("bits"));
    let Some(listed) = listed else { return Ok(USUAL_BITS) };
    let bits = listed.as_u64().and_then(|bits| u32::try_from(bits).ok()).filter(|bits| BITS.contains(bits));
    bits.ok_or_else(|| Error::input(format!("cases[{number}].bits = {listed}"), "the entry", "2 to 8"))
}
