//! The artifact's tensor table, and the layout of the tensors' data that it describes.
//!
//! The table lists names, element types, storages and shapes; what parts a tensor has, and how long each is, follows
//! from its storage and shape. The data is all parts one after another in the order that the table gives, each part
//! exactly once: parts cannot overlap, lie outside or leave gaps, and no offset is stored. How the bytes of each part are
//! arranged the table says too (`arrange`); neighbours can share planes or digits.
//!
//! Layout: number of tensors; names, each ended by a newline; element types; storages; ranks; sizes; then, for each part
//! in the order of the data, its number less that of the part before it; then the arrangement of each part's bytes.

use super::arrange::{Arrangement, Layout, Part, Unit};
use super::codec::Codec;
use super::container::MAX_RAW_BYTES;
use super::wire::{Cursor, put_signed, put_varint};
use crate::error::{Error, Result};
use crate::host::{HostTensor, HostType};
use crate::quant::ternary::Packing;
use crate::quant::{PartSpec, QuantTensor, Storage};
use rayon::prelude::*;
use std::collections::HashSet;

/// The most tensors that an artifact can hold.
pub const MAX_TENSORS: usize = 1 << 14;
/// The most dimensions that a tensor can have.
pub const MAX_RANK: usize = 8;
/// The largest size of one dimension.
pub const MAX_SIZE: u64 = 1 << 31;

const TYPES: [(u8, HostType); 8] = [
    (1, HostType::F32),
    (2, HostType::BF16),
    (3, HostType::F16),
    (4, HostType::F64),
    (5, HostType::I8),
    (6, HostType::I32),
    (7, HostType::I64),
    (8, HostType::U8),
];

const STORAGES: [(u8, Storage); 19] = [
    (1, Storage::Raw),
    (2, Storage::F32),
    (3, Storage::F16),
    (4, Storage::Int8Row),
    (5, Storage::Int8Tensor),
    (6, Storage::Ternary(Packing::TwoBits)),
    (7, Storage::Ternary(Packing::FiveTrits)),
    (12, Storage::IntRow(2)),
    (13, Storage::IntRow(3)),
    (14, Storage::IntRow(4)),
    (15, Storage::IntRow(5)),
    (16, Storage::IntRow(6)),
    (17, Storage::IntRow(7)),
    (22, Storage::IntTensor(2)),
    (23, Storage::IntTensor(3)),
    (24, Storage::IntTensor(4)),
    (25, Storage::IntTensor(5)),
    (26, Storage::IntTensor(6)),
    (27, Storage::IntTensor(7)),
];

const ARRANGEMENTS: [(u8, Arrangement); 5] = [
    (0, Arrangement::Plain),
    (1, Arrangement::Planes),
    (2, Arrangement::Digits),
    (3, Arrangement::Columns),
    (4, Arrangement::ColumnDigits),
];

/// The most bytes of a group of parts by which arrangements are compared.
const SAMPLE_BYTES: usize = 512 << 10;

fn number_of<T: PartialEq>(numbers: &[(u8, T)], value: &T) -> u8 {
    numbers.iter().find(|(_, known)| known == value).map_or(u8::MAX, |&(number, _)| number)
}

/// A tensor of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The tensor's name.
    pub name: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Element type before quantisation.
    pub original: HostType,
    /// How it is stored.
    pub storage: Storage,
    /// Its parts.
    pub parts: Vec<PartSpec>,
}

impl Entry {
    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// The storage's label, with the element type where the storage does not imply it.
    pub fn dtype_label(&self) -> String {
        match self.storage {
            Storage::Raw => format!("{:?}", self.original).to_lowercase(),
            storage => storage.label().to_owned(),
        }
    }

    fn layout(&self, part: usize) -> Layout {
        let PartSpec { name, dtype, bytes, .. } = self.parts[part];
        layout(self.storage, &self.shape, name, dtype, bytes)
    }

    /// Element type and sizes of the scales, `f16[512]`, or `f64[]` for a single one; none where there are none.
    pub fn scales_label(&self) -> Option<String> {
        let scales = self.parts.iter().find(|part| part.name == "scales")?;
        Some(format!("{}{:?}", format!("{:?}", scales.dtype).to_lowercase(), scales.shape))
    }

    /// Bytes of the parts that count ([`Storage::payload_bytes`]).
    pub fn payload_bytes(&self) -> usize {
        self.storage.payload_bytes(self.parts.iter().map(|part| (part.name, part.bytes)))
    }
}

/// One part in the order of the data.
#[derive(Debug, Clone, Copy)]
struct Placed {
    tensor: usize,
    part: usize,
    arrangement: Arrangement,
}

/// A table that was read and checked.
#[derive(Debug)]
pub struct TensorTable {
    /// The tensors, in the model's order.
    pub entries: Vec<Entry>,
    order: Vec<Placed>,
    place: String,
}

/// The layout of a tensor's part.
fn layout(storage: Storage, shape: &[usize], part: &str, dtype: HostType, bytes: usize) -> Layout {
    let unit = match (storage, part) {
        (Storage::IntRow(bits) | Storage::IntTensor(bits), "codes") => Unit::Codes(bits),
        (Storage::Int8Row | Storage::Int8Tensor, "codes") => Unit::Codes(8),
        (Storage::Ternary(packing), "codes") => Unit::Ternary(packing),
        _ => Unit::Bytes(dtype.size()),
    };
    let matrix = match *shape {
        [rows, cols] if part == "codes" => Some((rows, cols)),
        _ => None,
    };
    Layout { unit, bytes, matrix }
}

/// A model before compression.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// The table.
    pub table: Vec<u8>,
    /// The data.
    pub data: Vec<u8>,
    /// Where in the data its statistics change, in ascending order ([`Codec::compress_section`]).
    pub cuts: Vec<usize>,
}

/// The table and the data of a model, arranged as any codec takes them well. `place` is for messages.
pub fn encode(tensors: &[QuantTensor], place: &str) -> Result<Encoded> {
    let arrangements: Vec<Arrangement> =
        sources(tensors).iter().map(|source| usual(source.part.layout.unit)).collect();
    encode_arranged(tensors, &arrangements, place)
}

/// The same with an arrangement for each part in the order of the data, as [`arrange`] finds them.
pub fn encode_arranged(
    tensors: &[QuantTensor],
    arrangements: &[Arrangement],
    place: &str,
) -> Result<Encoded> {
    let mut table = Vec::new();
    put_varint(&mut table, tensors.len() as u64);
    for tensor in tensors {
        tensor.check()?;
        if tensor.name.contains(char::is_control) {
            return Err(Error::input(
                format!("tensor name {:?}", tensor.name),
                place,
                "no control characters",
            ));
        }
        table.extend_from_slice(tensor.name.as_bytes());
        table.push(b'\n');
    }
    table.extend(tensors.iter().map(|tensor| number_of(&TYPES, &tensor.original)));
    table.extend(tensors.iter().map(|tensor| number_of(&STORAGES, &tensor.storage)));
    table.extend(tensors.iter().map(|tensor| u8::try_from(tensor.shape.len()).unwrap_or(u8::MAX)));
    tensors.iter().flat_map(|tensor| &tensor.shape).for_each(|&size| put_varint(&mut table, size as u64));

    let sources = sources(tensors);
    let mut previous = 0;
    for source in &sources {
        put_signed(&mut table, source.number as i64 - previous);
        previous = source.number as i64;
    }
    table.extend(arrangements.iter().map(|arrangement| number_of(&ARRANGEMENTS, arrangement)));

    let mut data = Vec::with_capacity(tensors.iter().map(QuantTensor::payload_bytes).sum());
    let mut cuts = Vec::new();
    let arranged: Vec<(Part, Arrangement)> =
        sources.iter().map(|source| source.part).zip(arrangements.iter().copied()).collect();
    for run in arranged.chunk_by(|(part, a), (next, b)| a == b && a.joins(&part.layout, &next.layout)) {
        let parts: Vec<Part> = run.iter().map(|&(part, _)| part).collect();
        run[0].1.write(&parts, &mut data, &mut cuts).ok_or_else(|| {
            Error::failed("codes do not fit their arrangement", place, "codes within their bits")
        })?;
    }
    // What was written must be what a reader takes.
    decode(&table, data.len() as u64, place)?;
    Ok(Encoded { table, data, cuts })
}

/// A part in the order of the data.
struct Source<'a> {
    /// Its number in the order of the table.
    number: usize,
    class: (u8, usize),
    /// The role of its tensor.
    role: String,
    part: Part<'a>,
}

/// All parts in the order of the data: codes lie together, then scales, then kept floats, those by element size, as each has
/// its own statistics; and among them tensors of one role.
fn sources(tensors: &[QuantTensor]) -> Vec<Source<'_>> {
    let mut sources: Vec<Source> = tensors
        .iter()
        .flat_map(|tensor| tensor.parts.iter().map(move |part| (tensor, part)))
        .enumerate()
        .map(|(number, (tensor, part))| {
            let layout = layout(tensor.storage, &tensor.shape, &part.name, part.dtype, part.bytes.len());
            let class = match part.name.as_str() {
                "codes" => (0, 1),
                "scales" => (1, part.dtype.size()),
                _ => (2, part.dtype.size()),
            };
            let part = Part { layout, bytes: &part.bytes, is_new: true };
            Source { number, class, role: role(&tensor.name), part }
        })
        .collect();
    sources.sort_by(|a, b| (a.class, &a.role, a.number).cmp(&(b.class, &b.role, b.number)));
    for i in 1..sources.len() {
        let (before, source) = (&sources[i - 1], &sources[i]);
        let is_new = (before.class, &before.role, before.part.layout.unit)
            != (source.class, &source.role, source.part.layout.unit);
        sources[i].part.is_new = is_new;
    }
    sources
}

/// The name without its numbers: tensors of one role lie together over the blocks.
fn role(name: &str) -> String {
    name.chars().filter(|c| !c.is_ascii_digit()).collect()
}

/// The arrangement that needs no measuring.
fn usual(unit: Unit) -> Arrangement {
    if matches!(unit, Unit::Bytes(2..)) { Arrangement::Planes } else { Arrangement::Plain }
}

/// The arrangements, one for each group of parts, under which the codec makes the groups' first `SAMPLE_BYTES` the
/// smallest.
pub fn arrange(tensors: &[QuantTensor], codec: Codec) -> Result<Vec<Arrangement>> {
    tensors.iter().try_for_each(QuantTensor::check)?;
    let sources = sources(tensors);
    let groups: Vec<Vec<Part>> = sources
        .chunk_by(|_, next| !next.part.is_new)
        .map(|group| group.iter().map(|source| source.part).collect())
        .collect();
    let chosen: Result<Vec<Vec<Arrangement>>> = groups
        .par_iter()
        .map(|group| choose(group, codec).map(|arrangement| vec![arrangement; group.len()]))
        .collect();
    Ok(chosen?.concat())
}

fn choose(group: &[Part], codec: Codec) -> Result<Arrangement> {
    let plain = Arrangement::Plain;
    let unit = group[0].layout.unit;
    let sample = sample(group);
    // Of those that all parts take, the one that is the smallest, the first of equals.
    let least = |candidates: &[Arrangement]| -> Result<Arrangement> {
        let possible: Vec<Arrangement> =
            candidates.iter().copied().filter(|a| group.iter().all(|part| a.takes(part))).collect();
        if let [only] = possible[..] {
            return Ok(only);
        }
        let size = |a: &Arrangement| {
            let (mut data, mut cuts) = (Vec::new(), Vec::new());
            let written = a.write(&sample, &mut data, &mut cuts);
            written.map_or(Ok(usize::MAX), |()| Ok(codec.compress_section(&data, &cuts)?.len()))
        };
        let sizes: Vec<usize> = possible.par_iter().map(size).collect::<Result<_>>()?;
        let best = sizes.iter().enumerate().min_by_key(|(_, size)| **size);
        Ok(best.map_or(plain, |(at, _)| possible[at]))
    };
    match unit {
        // Few bytes in all, and a part of them alone says little.
        Unit::Bytes(_) => Ok(usual(unit)),
        Unit::Ternary(_) => least(&[plain, Arrangement::Columns]),
        Unit::Codes(_) => {
            let order = least(&[plain, Arrangement::Columns])?;
            least(&[order, order.with_digits()])
        }
    }
}

/// The first [`SAMPLE_BYTES`] of a group; the last matrix by whole rows.
fn sample<'a>(group: &[Part<'a>]) -> Vec<Part<'a>> {
    let mut left = SAMPLE_BYTES;
    let mut parts = Vec::new();
    for part in group {
        let mut part = *part;
        if part.layout.bytes > left && !matches!(part.layout.unit, Unit::Ternary(_)) {
            part.layout.bytes = left;
            if let Some((rows, cols)) = &mut part.layout.matrix {
                *rows = left / (*cols).max(1);
                part.layout.bytes = *rows * *cols;
            }
            part.bytes = &part.bytes[..part.layout.bytes];
        }
        left = left.saturating_sub(part.layout.bytes.max(1));
        parts.push(part);
        if left == 0 {
            break;
        }
    }
    parts
}

/// Reads a table whose data is `data_len` bytes long. `place` is the file, for messages.
pub fn decode(bytes: &[u8], data_len: u64, place: &str) -> Result<TensorTable> {
    let mut cursor = Cursor::new(bytes, "tensor table", place);
    let count = cursor.count("tensors", MAX_TENSORS)?;
    let names = (0..count).map(|_| read_name(&mut cursor)).collect::<Result<Vec<_>>>()?;
    let mut seen = HashSet::new();
    if let Some(name) = names.iter().find(|name| !seen.insert(**name)) {
        return Err(cursor.bad(format!("two tensors named {name}"), "names that differ"));
    }
    let types = read_numbers(&mut cursor, count, &TYPES, "element type")?;
    let storages = read_numbers(&mut cursor, count, &STORAGES, "storage")?;
    let ranks = cursor.take(count)?;
    let mut entries = Vec::with_capacity(count);
    let mut total = 0u64;
    for (((name, original), storage), &rank) in names.into_iter().zip(types).zip(storages).zip(ranks) {
        if usize::from(rank) > MAX_RANK {
            return Err(
                cursor.bad(format!("tensor {name} has {rank} dimensions"), format!("at most {MAX_RANK}"))
            );
        }
        let shape = (0..rank)
            .map(|_| cursor.varint("size of a dimension", MAX_SIZE).map(|size| size as usize))
            .collect::<Result<Vec<_>>>()?;
        let parts = storage.parts(original, &shape, name, place)?;
        total = parts.iter().fold(total, |sum, part| sum.saturating_add(part.bytes as u64));
        entries.push(Entry { name: name.to_owned(), shape, original, storage, parts });
    }
    if total > MAX_RAW_BYTES {
        return Err(cursor.bad(format!("tensors of {total} bytes"), format!("at most {MAX_RAW_BYTES} bytes")));
    }
    let order = read_order(&mut cursor, &entries)?;
    let table = TensorTable { entries, order, place: place.to_owned() };
    let arranged: usize = table.runs().map(|run| table.run_len(run)).sum();
    if arranged as u64 != data_len {
        return Err(cursor.bad(
            format!("tensors of {arranged} bytes"),
            format!("the {data_len} bytes of the tensor data"),
        ));
    }
    cursor.finish()?;
    Ok(table)
}

fn read_name<'a>(cursor: &mut Cursor<'a>) -> Result<&'a str> {
    let bytes = cursor.take_until(b'\n')?;
    cursor.line("tensor name", cursor.utf8("tensor name", bytes)?)
}

fn read_numbers<T: Copy>(cursor: &mut Cursor, count: usize, known: &[(u8, T)], what: &str) -> Result<Vec<T>> {
    cursor
        .take(count)?
        .iter()
        .map(|number| {
            known.iter().find(|(n, _)| n == number).map(|&(_, value)| value).ok_or_else(|| {
                cursor.bad(format!("{what} {number}"), "one that this version knows (or a newer fairway)")
            })
        })
        .collect()
}

fn read_order(cursor: &mut Cursor, entries: &[Entry]) -> Result<Vec<Placed>> {
    let parts: Vec<(usize, usize)> = entries
        .iter()
        .enumerate()
        .flat_map(|(tensor, entry)| (0..entry.parts.len()).map(move |part| (tensor, part)))
        .collect();
    let mut placed = vec![false; parts.len()];
    let mut numbers = Vec::with_capacity(parts.len());
    let mut number = 0i64;
    for _ in 0..parts.len() {
        number = number.saturating_add(cursor.signed("number of a part")?);
        match usize::try_from(number).ok().and_then(|at| placed.get_mut(at).map(|seen| (at, seen))) {
            Some((at, seen)) if !*seen => {
                *seen = true;
                numbers.push(at);
            }
            Some((at, _)) => {
                return Err(cursor.bad(format!("part {at} placed twice"), "parts that do not overlap"));
            }
            None => {
                return Err(
                    cursor.bad(format!("part {number} placed"), format!("parts below {}", parts.len()))
                );
            }
        }
    }
    let arrangements = read_numbers(cursor, parts.len(), &ARRANGEMENTS, "arrangement")?;
    let mut order = Vec::with_capacity(parts.len());
    for (at, arrangement) in numbers.into_iter().zip(arrangements) {
        let (tensor, part) = parts[at];
        let entry = &entries[tensor];
        if !arrangement.suits(&entry.layout(part)) {
            return Err(cursor.bad(
                format!(
                    "arrangement {} of {} of tensor {}",
                    number_of(&ARRANGEMENTS, &arrangement),
                    entry.parts[part].name,
                    entry.name
                ),
                "one that its storage and shape can have",
            ));
        }
        order.push(Placed { tensor, part, arrangement });
    }
    Ok(order)
}

impl TensorTable {
    fn layout(&self, placed: &Placed) -> Layout {
        self.entries[placed.tensor].layout(placed.part)
    }

    /// Neighbours in the data that lie in each other.
    fn runs(&self) -> impl Iterator<Item = &[Placed]> {
        self.order.chunk_by(|p, next| {
            p.arrangement == next.arrangement && p.arrangement.joins(&self.layout(p), &self.layout(next))
        })
    }

    /// Bytes of a run in the data.
    fn run_len(&self, run: &[Placed]) -> usize {
        let bytes = run.iter().map(|placed| self.layout(placed).bytes).sum();
        run.first().map_or(0, |first| first.arrangement.data_len(self.layout(first).unit, bytes))
    }

    /// Builds the tensors, taking the data run by run from `next`, which gives exactly the bytes asked for.
    ///
    /// # Errors
    /// Those of `next`, and digits that no code has.
    pub fn read_data(self, mut next: impl FnMut(u64) -> Result<Vec<u8>>) -> Result<Vec<QuantTensor>> {
        let runs: Vec<(Arrangement, Vec<Placed>, Vec<Layout>, usize)> = self
            .runs()
            .map(|run| {
                let layouts = run.iter().map(|placed| self.layout(placed)).collect();
                (run[0].arrangement, run.to_vec(), layouts, self.run_len(run))
            })
            .collect();
        let place = self.place;
        let mut tensors: Vec<QuantTensor> = self
            .entries
            .into_iter()
            .map(|entry| {
                let parts = entry.parts.into_iter().map(|spec| HostTensor {
                    name: spec.name.into(),
                    shape: spec.shape,
                    dtype: spec.dtype,
                    bytes: Vec::new(),
                });
                QuantTensor {
                    name: entry.name,
                    shape: entry.shape,
                    original: entry.original,
                    storage: entry.storage,
                    parts: parts.collect(),
                }
            })
            .collect();
        for (arrangement, run, layouts, len) in runs {
            let parts = arrangement.read(next(len as u64)?, &layouts).ok_or_else(|| {
                let name = run.first().map_or("", |placed| tensors[placed.tensor].name.as_str());
                Error::input(
                    format!("data of tensor {name} that no codes are written as"),
                    &place,
                    "digits within their range, filled up with 0",
                )
            })?;
            for (placed, bytes) in run.into_iter().zip(parts) {
                tensors[placed.tensor].parts[placed.part].bytes = bytes;
            }
        }
        Ok(tensors)
    }
}
