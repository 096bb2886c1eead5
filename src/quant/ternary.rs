//! Ternary matrices: codes -1, 0, 1 and one scale for the whole matrix (`spec/pr1994.md` section 8).
//!
//! The scale is kept as gamma, the mean magnitude of the weights: what a BitLinear layer computes its step from in each
//! forward pass. So a matrix is restored as code x gamma / (share of codes that are not 0), whose mean magnitude is gamma
//! again and which the layer's own rounding leaves as it is.
//!
//! Two packings, elements in row-major order, the first one lowest: 2 bits each (PR #1994's), or five trits a byte, which is
//! 1.6 bits each.

use super::clip::round_even;
use std::ops::Range;

/// The least gamma (PR #1994).
pub const LEAST_GAMMA: f32 = 1e-8;

/// How codes become bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// Four codes a byte, the first in the lowest bits; the last byte is filled up with zero bits.
    TwoBits,
    /// Five codes a byte as digits of a number to base 3, the first the lowest; the last byte is filled up with digits 0.
    FiveTrits,
}

impl Packing {
    /// Codes in a byte, and the base that they are digits of.
    fn digits(self) -> (usize, u8) {
        match self {
            Self::TwoBits => (4, 4),
            Self::FiveTrits => (5, 3),
        }
    }

    /// Bytes of `codes` codes.
    pub fn bytes(self, codes: usize) -> usize {
        codes.div_ceil(self.digits().0)
    }

    /// Packs codes from -1 to 1.
    pub fn pack(self, codes: &[i8]) -> Vec<u8> {
        let (count, base) = self.digits();
        let digit = |code: &i8| (code.clamp(&-1, &1) + 1).cast_unsigned();
        codes
            .chunks(count)
            .map(|codes| codes.iter().rev().fold(0, |byte, code| byte * base + digit(code)))
            .collect()
    }

    /// Whether `packed` is how so many codes are packed: as long as they are, and no digit that no code has (in the filling
    /// too: one matrix has one packing).
    fn is_packed(self, packed: &[u8], count: usize) -> bool {
        let (per_byte, base) = self.digits();
        let is_codes = |byte: &u8| match self {
            Self::TwoBits => byte & (byte >> 1) & 0b0101_0101 == 0,
            Self::FiveTrits => *byte < 243,
        };
        let used = count % per_byte;
        let is_filled = |last: &u8| used == 0 || *last < base.pow(used as u32);
        packed.len() == self.bytes(count)
            && packed.iter().all(is_codes)
            && packed.last().is_none_or(is_filled)
    }

    /// The first `count` codes; none if `packed` is not what so many codes are packed as.
    pub fn unpack(self, packed: &[u8], count: usize) -> Option<Vec<i8>> {
        if !self.is_packed(packed, count) {
            return None;
        }
        let (per_byte, base) = self.digits();
        let mut codes = Vec::with_capacity(packed.len() * per_byte);
        for &byte in packed {
            let mut rest = byte;
            for _ in 0..per_byte {
                codes.push((rest % base).cast_signed() - 1);
                rest /= base;
            }
        }
        codes.truncate(count);
        Some(codes)
    }

    /// The packed transpose of a packed matrix [rows, cols]; none if it is not packed so. Never unpacked: that would take
    /// five times the memory.
    pub fn transpose(self, packed: &[u8], rows: usize, cols: usize) -> Option<Vec<u8>> {
        self.is_packed(packed, rows * cols).then(|| match self {
            Self::TwoBits => transpose_digits::<4, 4>(packed, rows, cols),
            Self::FiveTrits => transpose_digits::<5, 3>(packed, rows, cols),
        })
    }
}

/// The transpose of a matrix [rows, cols] of digits to base `BASE`, `PER_BYTE` a byte.
fn transpose_digits<const PER_BYTE: usize, const BASE: u8>(
    packed: &[u8],
    rows: usize,
    cols: usize,
) -> Vec<u8> {
    let places: [u8; PER_BYTE] = std::array::from_fn(|place| BASE.pow(place as u32));
    let digit = |at: usize| packed[at / PER_BYTE] / places[at % PER_BYTE] % BASE;
    let mut transposed = vec![0; packed.len()];
    for col in 0..cols {
        for row in 0..rows {
            let at = col * rows + row;
            transposed[at / PER_BYTE] += digit(row * cols + col) * places[at % PER_BYTE];
        }
    }
    transposed
}

/// A matrix in ternary codes.
#[derive(Debug, Clone, PartialEq)]
pub struct Ternary {
    /// Codes from -1 to 1.
    pub codes: Vec<i8>,
    /// The mean magnitude of the restored matrix.
    pub gamma: f32,
}

impl Ternary {
    /// The codes of a BitLinear layer: gamma = max(mean |w|, 1e-8), code = clamp(round(w / gamma), -1, 1).
    ///
    /// The mean is summed in float64 and rounded once; PyTorch's float32 sum can differ from it in the last bit.
    pub fn bit_linear(weights: &[f32]) -> Self {
        let sum: f64 = weights.iter().map(|w| f64::from(w.abs())).sum();
        let gamma = ((sum / weights.len().max(1) as f64) as f32).max(LEAST_GAMMA);
        let code = |w: &f32| round_even((w / gamma).clamp(-1.0, 1.0)) as i8;
        Self { codes: weights.iter().map(code).collect(), gamma }
    }

    /// The codes for a layer that uses its weights as they are: those of [`Self::bit_linear`], with the step that leaves the
    /// least squared error.
    pub fn least_squares(weights: &[f32]) -> Self {
        let Self { codes, gamma } = Self::bit_linear(weights);
        let agreement: f64 = weights.iter().zip(&codes).map(|(w, &c)| f64::from(w * f32::from(c))).sum();
        let nonzero = codes.iter().filter(|code| **code != 0).count();
        // The step is agreement / nonzero, and gamma the step times the share of codes that are not 0.
        let mean = (agreement / codes.len().max(1) as f64) as f32;
        Self { codes, gamma: if nonzero > 0 { mean.max(LEAST_GAMMA) } else { gamma } }
    }

    /// The step: gamma over the share of codes that are not 0; 0 for a matrix of zeros.
    pub fn step(&self) -> f32 {
        let nonzero = self.codes.iter().filter(|code| **code != 0).count();
        if nonzero == 0 {
            return 0.0;
        }
        (f64::from(self.gamma) / (nonzero as f64 / self.codes.len() as f64)) as f32
    }

    /// The codes of that range, with the step that they have here.
    pub fn part(&self, range: Range<usize>) -> Self {
        let codes = self.codes[range].to_vec();
        let nonzero = codes.iter().filter(|code| **code != 0).count();
        let share = nonzero as f64 / codes.len().max(1) as f64;
        Self { codes, gamma: (f64::from(self.step()) * share) as f32 }
    }

    /// The weights.
    pub fn restore(&self) -> Vec<f32> {
        let step = self.step();
        self.codes.iter().map(|&code| f32::from(code) * step).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packings_are_their_formats() {
        assert_eq!(Packing::TwoBits.pack(&[-1, 0, 1, 0, 1]), [0b0110_0100, 0b10]);
        assert_eq!(Packing::FiveTrits.pack(&[-1, 0, 1, 0, 1, 1]), [3 + 2 * 9 + 27 + 2 * 81, 2]);
        assert_eq!(Packing::FiveTrits.pack(&[1; 5]), [242]);
        assert!(Packing::TwoBits.pack(&[]).is_empty());
    }

    #[test]
    fn unpacking_is_the_inverse_at_every_length() {
        let codes: Vec<i8> = (0..97).map(|i: i32| (((i * i) / 3 + i) % 3 - 1) as i8).collect();
        for packing in [Packing::TwoBits, Packing::FiveTrits] {
            for n in 0..codes.len() {
                let packed = packing.pack(&codes[..n]);
                assert_eq!(packed.len(), packing.bytes(n));
                assert_eq!(packing.unpack(&packed, n).as_deref(), Some(&codes[..n]), "{packing:?} {n}");
                assert!(packing.unpack(&packed, n + packing.digits().0).is_none());
            }
        }
    }

    #[test]
    fn bytes_that_no_packing_makes_are_refused() {
        assert!(Packing::TwoBits.unpack(&[0b1100_0000], 4).is_none());
        assert!(Packing::FiveTrits.unpack(&[243], 5).is_none());
        // Filling that is not empty.
        assert!(Packing::TwoBits.unpack(&[0b0100_0000], 3).is_none());
        assert!(Packing::FiveTrits.unpack(&[81], 4).is_none());
        assert!(Packing::FiveTrits.unpack(&[80], 4).is_some());
        for (packing, byte, rows) in [(Packing::TwoBits, 0b0100_0000, 3), (Packing::FiveTrits, 81, 4)] {
            assert!(packing.transpose(&[byte], rows, 1).is_none());
            assert!(packing.transpose(&[byte], 1, rows + 1).is_some());
            assert!(packing.transpose(&[byte], 3, 3).is_none());
        }
    }

    #[test]
    fn a_packed_matrix_is_transposed_as_its_codes_are() {
        for packing in [Packing::TwoBits, Packing::FiveTrits] {
            for (rows, cols) in [(0, 3), (1, 1), (1, 9), (7, 1), (4, 5), (13, 11), (20, 30)] {
                let code = |row: usize, col: usize| ((row * row + 2 * col * row + col) % 3) as i8 - 1;
                let by_rows: Vec<i8> = (0..rows * cols).map(|at| code(at / cols, at % cols)).collect();
                let by_cols: Vec<i8> = (0..rows * cols).map(|at| code(at % rows, at / rows)).collect();
                let transposed = packing.transpose(&packing.pack(&by_rows), rows, cols);
                assert_eq!(transposed, Some(packing.pack(&by_cols)), "{packing:?} {rows} x {cols}");
            }
        }
    }

    #[test]
    fn a_restored_matrix_codes_as_itself() {
        let weights: Vec<f32> = (0..999i32).map(|i| ((i * 7919) % 2011 - 1005) as f32 / 9000.0).collect();
        let ternary = Ternary::bit_linear(&weights);
        let restored = ternary.restore();
        let again = Ternary::bit_linear(&restored);
        assert_eq!(again.codes, ternary.codes);
        assert!((again.gamma / ternary.gamma - 1.0).abs() < 1e-6);
        let error = |restored: &[f32]| -> f64 {
            weights.iter().zip(restored).map(|(w, r)| f64::from(w - r).powi(2)).sum()
        };
        let fitted = Ternary::least_squares(&weights);
        assert_eq!(fitted.codes, ternary.codes);
        let best = error(&fitted.restore());
        assert!(best < error(&restored));
        for factor in [0.99, 1.01] {
            let moved = Ternary { gamma: fitted.gamma * factor, ..fitted.clone() };
            assert!(error(&moved.restore()) > best);
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        for ternary in
            [Ternary::bit_linear(&[0.0; 7]), Ternary::least_squares(&[0.0; 7]), Ternary::bit_linear(&[])]
        {
            assert_eq!(ternary.gamma, LEAST_GAMMA);
            assert!(ternary.restore().iter().all(|w| *w == 0.0));
        }
    }
}
