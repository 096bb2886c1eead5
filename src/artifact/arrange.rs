//! How the bytes of neighbouring parts are arranged in an artifact's data, so that a codec finds what there is to find.
//!
//! | arrangement | for | bytes |
//! |---|---|---|
//! | plain | anything | as they are |
//! | planes | elements of several bytes | all lowest bytes, then all second bytes, and so on |
//! | digits | integer codes of 2 to 8 bits | see below |
//! | columns | codes of a matrix | column by column |
//! | column digits | integer codes of a matrix | digits of the codes column by column |
//!
//! Digits: a code of 3 to 8 bits, counted from the least one, is its lowest bits above four and the upper four (three of
//! three). First come the lowest bits of all codes, bit by bit without gaps, the first in the lowest; then the upper digits, two
//! a byte, the first lower. Low bits of Gaussian codes are noise that no codec shortens, and pairs of digits lose less to
//! codes of whole bits. Codes of 2 bits are five trits a byte (-2 has no trit). What is filled up is 0.
//!
//! Which one a group of tensors gets is measured with the codec at hand (`tensor_table`). Against plain bytes, in percent, on
//! Gaussian codes and on those of two small trained models (a transformer by Muon, a hybrid with Mamba-3):
//!
//! | codes | brotli | lzma | zstd | zlib |
//! |---|---|---|---|---|
//! | 2 bits | 0.0, -3.2, 0.0 | -7.9, -11.8, -10.3 | -0.5, -4.1, -0.4 | -14.8, -17.9, -16.3 |
//! | 3 bits | -0.8, -3.2, -1.0 | -7.8, -10.2, -9.4 | -1.0, -2.3, -0.3 | -6.4, -8.5, -7.5 |
//! | 4 bits | -0.1, -1.2, -0.2 | -4.0, -5.1, -2.8 | -0.2, -0.8, 0.0 | -12.6, -13.1, -13.4 |
//! | 6 bits | -0.1, -0.9, 0.0 | -1.1 | 0.0, 0.0, 0.0 | -5.9 |
//! | 8 bits | 0.0, -1.0, 0.0 | -0.4 | -0.1, -0.2, 0.0 | 0.0, -0.1, 0.0 |
//!
//! Bit planes, bits packed across bytes, and codes in other orders of their values were measured too, and never won.

use crate::quant::ternary::Packing;

/// An arrangement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrangement {
    /// As they are.
    Plain,
    /// All lowest bytes, then all second bytes, and so on: exponents compress apart from mantissas (a tenth less for
    /// float32 control tensors).
    Planes,
    /// Integer codes as digits.
    Digits,
    /// A matrix of codes column by column.
    Columns,
    /// A matrix of integer codes as digits column by column.
    ColumnDigits,
}

/// What the elements of a part are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Elements of so many bytes.
    Bytes(usize),
    /// Integer codes of so many bits (2 to 8), each in a byte.
    Codes(u8),
    /// Packed ternary codes.
    Ternary(Packing),
}

impl Unit {
    /// Bytes of an element as it is stored.
    fn size(self) -> usize {
        if let Self::Bytes(size) = self { size } else { 1 }
    }
}

/// What decides where a part's bytes lie: its unit, its bytes, and rows and columns where its tensor is a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Elements.
    pub unit: Unit,
    /// Bytes of the part.
    pub bytes: usize,
    /// Rows and columns of the tensor's codes.
    pub matrix: Option<(usize, usize)>,
}

impl Arrangement {
    /// Whether parts of this layout can be arranged so.
    pub fn suits(self, layout: &Layout) -> bool {
        let (codes, matrix) = (matches!(layout.unit, Unit::Codes(_)), layout.matrix.is_some());
        match self {
            Self::Plain | Self::Planes => true,
            Self::Digits => codes,
            Self::Columns => matrix && !matches!(layout.unit, Unit::Bytes(_)),
            Self::ColumnDigits => matrix && codes,
        }
    }

    /// The same without digits, and whether it has them.
    fn order(self) -> (Self, bool) {
        match self {
            Self::Digits => (Self::Plain, true),
            Self::ColumnDigits => (Self::Columns, true),
            other => (other, false),
        }
    }

    /// The same with digits.
    pub fn with_digits(self) -> Self {
        if self.order().0 == Self::Columns { Self::ColumnDigits } else { Self::Digits }
    }

    /// Whether neighbours of these layouts, both arranged so, share their planes or digits.
    pub fn joins(self, layout: &Layout, next: &Layout) -> bool {
        match self {
            Self::Plain | Self::Columns => false,
            Self::Planes => layout.unit.size() == next.unit.size(),
            Self::Digits | Self::ColumnDigits => layout.unit == next.unit,
        }
    }

    /// Bytes in the data of a run of neighbours that share an arrangement, `bytes` long in all.
    pub fn data_len(self, unit: Unit, bytes: usize) -> usize {
        match (self.order(), unit) {
            ((_, true), Unit::Codes(bits)) => {
                Digits::of(bits).low_len(bytes) + Digits::of(bits).upper_len(bytes)
            }
            _ => bytes,
        }
    }

    /// Whether the bytes of a part can be written so: no code is beyond its bits, no byte packs what is no code.
    pub fn takes(self, part: &Part) -> bool {
        let (order, has_digits) = self.order();
        self.suits(&part.layout)
            && match part.layout.unit {
                Unit::Codes(bits) if has_digits => Digits::of(bits).take(part.bytes),
                Unit::Ternary(_) if order == Self::Columns => {
                    transposed(part.bytes, &part.layout, true).is_some()
                }
                _ => true,
            }
    }

    /// Appends a run to `data`, and to `cuts` where in it its statistics change: each part is new if `is_new` says so. None if
    /// a part holds what this arrangement cannot (a code beyond its bits).
    pub fn write(self, run: &[Part], data: &mut Vec<u8>, cuts: &mut Vec<usize>) -> Option<()> {
        let Some(first) = run.first() else { return Some(()) };
        let (order, has_digits) = self.order();
        let unit = first.layout.unit;
        if order == Self::Planes {
            let size = unit.size();
            for plane in 0..size {
                cuts.push(data.len());
                for part in run {
                    data.extend(part.bytes.iter().skip(plane).step_by(size));
                }
            }
            return Some(());
        }
        let mut bytes = Vec::with_capacity(run.iter().map(|part| part.bytes.len()).sum());
        let mut borders = Vec::new();
        for part in run {
            if part.is_new {
                borders.push(bytes.len());
            }
            match order {
                Self::Columns => bytes.extend(transposed(part.bytes, &part.layout, true)?),
                _ => bytes.extend_from_slice(part.bytes),
            }
        }
        match unit {
            Unit::Codes(bits) if has_digits => {
                let digits = Digits::of(bits);
                let start = data.len();
                digits.write(&bytes, data)?;
                let upper = start + digits.low_len(bytes.len());
                if digits.low > 0 {
                    cuts.extend(borders.iter().map(|&border| start + digits.low_len(border)));
                }
                cuts.extend(borders.iter().map(|&border| upper + digits.upper_len(border)));
            }
            _ => {
                cuts.extend(borders.iter().map(|&border| data.len() + border));
                data.extend_from_slice(&bytes);
            }
        }
        Some(())
    }

    /// The inverse: the parts of a run from its `block` in the data. None if no part is written so.
    pub fn read(self, block: Vec<u8>, layouts: &[Layout]) -> Option<Vec<Vec<u8>>> {
        let [first, rest @ ..] = layouts else { return block.is_empty().then(Vec::new) };
        let (order, has_digits) = self.order();
        let total = layouts.iter().map(|layout| layout.bytes).sum();
        let block = match first.unit {
            Unit::Codes(bits) if has_digits => {
                // Moved, to be gone before the parts are made.
                let digits = block;
                Digits::of(bits).read(&digits, total)?
            }
            _ => block,
        };
        if block.len() != total {
            return None;
        }
        if order == Self::Plain && rest.is_empty() {
            return Some(vec![block]);
        }
        let size = first.unit.size();
        let elements = total / size;
        let mut start = 0;
        let part = |layout: &Layout| {
            let range = start..start + layout.bytes;
            start = range.end;
            match order {
                Self::Planes => {
                    let mut bytes = Vec::with_capacity(layout.bytes);
                    for i in range.start / size..range.end / size {
                        bytes.extend((0..size).map(|plane| block[plane * elements + i]));
                    }
                    Some(bytes)
                }
                Self::Columns => transposed(&block[range], layout, false),
                _ => Some(block[range].to_vec()),
            }
        };
        layouts.iter().map(part).collect()
    }
}

/// One part of a run.
#[derive(Debug, Clone, Copy)]
pub struct Part<'a> {
    /// Its layout.
    pub layout: Layout,
    /// Its bytes.
    pub bytes: &'a [u8],
    /// Whether its statistics differ from those of the part before.
    pub is_new: bool,
}

/// A matrix of codes column by column, or the inverse.
fn transposed(bytes: &[u8], layout: &Layout, forward: bool) -> Option<Vec<u8>> {
    let (rows, cols) = layout.matrix?;
    let (rows, cols) = if forward { (rows, cols) } else { (cols, rows) };
    match layout.unit {
        Unit::Ternary(packing) => packing.transpose(bytes, rows, cols),
        _ if bytes.len() == rows * cols => Some(transpose(bytes, rows, cols)),
        _ => None,
    }
}

fn transpose(matrix: &[u8], rows: usize, cols: usize) -> Vec<u8> {
    let mut transposed = Vec::with_capacity(matrix.len());
    for j in 0..cols {
        transposed.extend((0..rows).map(|i| matrix[i * cols + j]));
    }
    transposed
}

/// The digits of integer codes of so many bits.
#[derive(Debug, Clone, Copy)]
struct Digits {
    bits: u8,
    /// Bits of a code that lie apart.
    low: u8,
}

impl Digits {
    fn of(bits: u8) -> Self {
        Self { bits, low: bits.saturating_sub(4) }
    }

    fn low_len(self, codes: usize) -> usize {
        // Not codes * low / 8: that could overflow.
        codes / 8 * usize::from(self.low) + (codes % 8 * usize::from(self.low)).div_ceil(8)
    }

    fn upper_len(self, codes: usize) -> usize {
        if self.bits == 2 { Packing::FiveTrits.bytes(codes) } else { codes.div_ceil(2) }
    }

    /// Bits of an upper digit.
    fn upper(self) -> u8 {
        self.bits - self.low
    }

    fn half(self) -> i16 {
        1 << (self.bits - 1)
    }

    /// Whether all codes have digits.
    fn take(self, codes: &[u8]) -> bool {
        let range = if self.bits == 2 { -1..2 } else { -self.half()..self.half() };
        codes.iter().all(|code| range.contains(&code.cast_signed().into()))
    }

    fn write(self, codes: &[u8], data: &mut Vec<u8>) -> Option<()> {
        if !self.take(codes) {
            return None;
        }
        if self.bits == 2 {
            let codes: Vec<i8> = codes.iter().map(|byte| byte.cast_signed()).collect();
            data.extend(Packing::FiveTrits.pack(&codes));
            return Some(());
        }
        let number = |code: &u8| (i16::from(code.cast_signed()) + self.half()) as u8;
        let mask = (1u16 << self.low) - 1;
        // Eight codes fill whole bytes.
        for codes in codes.chunks(8).filter(|_| self.low > 0) {
            let lows = codes
                .iter()
                .rev()
                .fold(0u64, |all, byte| (all << self.low) | u64::from(u16::from(number(byte)) & mask));
            data.extend_from_slice(&lows.to_le_bytes()[..self.low_len(codes.len())]);
        }
        let digit = |byte: &u8| number(byte) >> self.low;
        data.extend(
            codes.chunks(2).map(|pair| digit(&pair[0]) | pair.get(1).map_or(0, digit) << self.upper()),
        );
        Some(())
    }

    fn read(self, block: &[u8], codes: usize) -> Option<Vec<u8>> {
        if block.len() != self.low_len(codes) + self.upper_len(codes) {
            return None;
        }
        if self.bits == 2 {
            let codes = Packing::FiveTrits.unpack(block, codes)?;
            return Some(codes.into_iter().map(i8::cast_unsigned).collect());
        }
        let (lows, uppers) = block.split_at(self.low_len(codes));
        let mut numbers = Vec::with_capacity(codes + 1);
        for &pair in uppers {
            let upper = pair >> self.upper();
            if upper >> self.upper() != 0 {
                return None;
            }
            numbers.extend([pair & ((1 << self.upper()) - 1), upper]);
        }
        if numbers.split_off(codes).iter().any(|&filling| filling != 0) {
            return None;
        }
        let mask = (1u64 << self.low) - 1;
        for (numbers, lows) in numbers.chunks_mut(8).zip(lows.chunks(usize::from(self.low).max(1))) {
            let mut word = [0; 8];
            word[..lows.len()].copy_from_slice(lows);
            let mut all = u64::from_le_bytes(word);
            for number in numbers {
                *number = (*number << self.low) | (all & mask) as u8;
                all >>= self.low;
            }
            if all != 0 {
                return None;
            }
        }
        let half = 1u8 << (self.bits - 1);
        numbers.iter_mut().for_each(|number| *number = number.wrapping_sub(half));
        Some(numbers)
    }
}
