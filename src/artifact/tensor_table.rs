//! The artifact's tensor table, and the layout of the tensors' data that it describes.
//!
//! The table lists names, element types, storages and shapes; what parts a tensor has, and how long each is, follows
//! from its storage and shape. The data is all parts one after another in the order that the table gives, each part
//! exactly once: parts cannot overlap, lie outside or leave gaps, and no offset is stored. Neighbours of one element
//! size that are both arranged in planes share them: all their lowest bytes, then all their second bytes, and so on.
//!
//! Layout: number of tensors; names, each ended by a newline; element types; storages; ranks; sizes; then, for each part
//! in the order of the data, its number less that of the part before it; then the arrangement of each part's bytes.

use super::wire::{Cursor, put_signed, put_varint};
use crate::error::{Error, Result};
use crate::host::{HostTensor, HostType};
use crate::quant::ternary::Packing;
use crate::quant::{PartSpec, QuantTensor, Storage};
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

/// How a part's bytes are arranged in the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Arrangement {
    /// As they are.
    Plain,
    /// All lowest bytes, then all second bytes, and so on: exponents compress apart from mantissas (a tenth less for
    /// float32 control tensors).
    Planes,
}

const ARRANGEMENTS: [(u8, Arrangement); 2] = [(0, Arrangement::Plain), (1, Arrangement::Planes)];

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
}

/// A model before compression.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// The table.
    pub table: Vec<u8>,
    /// The data.
    pub data: Vec<u8>,
    /// Where in the data its statistics change, in ascending order ([`super::Codec::compress_pieces`]).
    pub cuts: Vec<usize>,
}

/// The table and the data of a model. `place` is for messages.
pub fn encode(tensors: &[QuantTensor], place: &str) -> Result<Encoded> {
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

    // (number of the part, role of its tensor, part)
    let mut parts: Vec<(usize, String, &HostTensor)> = tensors
        .iter()
        .flat_map(|tensor| tensor.parts.iter().map(|part| (role(&tensor.name), part)))
        .enumerate()
        .map(|(number, (role, part))| (number, role, part))
        .collect();
    parts.sort_by(|(n, role, part), (m, other, of)| (class(part), role, n).cmp(&(class(of), other, m)));
    let mut previous = 0;
    for &(number, ..) in &parts {
        put_signed(&mut table, number as i64 - previous);
        previous = number as i64;
    }
    table.extend(parts.iter().map(|(.., part)| number_of(&ARRANGEMENTS, &arrangement(part))));

    let mut data = Vec::with_capacity(tensors.iter().map(QuantTensor::payload_bytes).sum());
    let mut cuts = Vec::new();
    for run in parts.chunk_by(|(_, role, part), (_, next_role, next)| {
        let arranged = arrangement(part);
        arranged == arrangement(next)
            && part.dtype.size() == next.dtype.size()
            && (arranged == Arrangement::Planes || role == next_role)
    }) {
        let size = run[0].2.dtype.size();
        for plane in 0..size {
            cuts.push(data.len());
            for (.., part) in run {
                data.extend(part.bytes.iter().skip(plane).step_by(size));
            }
        }
    }
    // What was written must be what a reader takes.
    decode(&table, data.len() as u64, place)?;
    Ok(Encoded { table, data, cuts })
}

fn arrangement(part: &HostTensor) -> Arrangement {
    if part.dtype.size() > 1 { Arrangement::Planes } else { Arrangement::Plain }
}

/// Codes lie together, then scales, then kept floats by element size: each has its own statistics.
fn class(part: &HostTensor) -> (bool, usize) {
    (part.name != "codes", if part.name == "scales" { 0 } else { part.dtype.size() })
}

/// The name without its numbers: tensors of one role lie together over the blocks.
fn role(name: &str) -> String {
    name.chars().filter(|c| !c.is_ascii_digit()).collect()
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
    if total != data_len {
        return Err(cursor
            .bad(format!("tensors of {total} bytes"), format!("the {data_len} bytes of the tensor data")));
    }
    let order = read_order(&mut cursor, &entries)?;
    cursor.finish()?;
    Ok(TensorTable { entries, order })
}

fn read_name<'a>(cursor: &mut Cursor<'a>) -> Result<&'a str> {
    let bytes = cursor.take_until(b'\n')?;
    let name = cursor.utf8("tensor name", bytes)?;
    if name.contains(char::is_control) {
        return Err(cursor.bad(format!("tensor name {name:?}"), "no control characters"));
    }
    Ok(name)
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
    Ok(numbers
        .into_iter()
        .zip(arrangements)
        .map(|(at, arrangement)| Placed { tensor: parts[at].0, part: parts[at].1, arrangement })
        .collect())
}

impl TensorTable {
    /// Builds the tensors, taking the data part by part from `next`, which gives exactly the bytes asked for.
    pub fn read_data(self, mut next: impl FnMut(u64) -> Result<Vec<u8>>) -> Result<Vec<QuantTensor>> {
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
        let size_of = |tensors: &[QuantTensor], p: &Placed| tensors[p.tensor].parts[p.part].dtype.size();
        for run in self
            .order
            .chunk_by(|p, next| {
                p.arrangement == Arrangement::Planes
                    && next.arrangement == Arrangement::Planes
                    && size_of(&tensors, p) == size_of(&tensors, next)
            })
            .map(<[Placed]>::to_vec)
            .collect::<Vec<_>>()
        {
            let size = size_of(&tensors, &run[0]);
            let elements: usize = run.iter().map(|p| tensors[p.tensor].parts[p.part].numel()).sum();
            let block = next((elements * size) as u64)?;
            if run[0].arrangement == Arrangement::Plain {
                tensors[run[0].tensor].parts[run[0].part].bytes = block;
                continue;
            }
            let mut start = 0;
            for placed in run {
                let part = &mut tensors[placed.tensor].parts[placed.part];
                let range = start..start + part.numel();
                start = range.end;
                part.bytes = range
                    .flat_map(|i| (0..size).map(move |plane| (plane, i)))
                    .map(|(plane, i)| block[plane * elements + i])
                    .collect();
            }
        }
        Ok(tensors)
    }
}
