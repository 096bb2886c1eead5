//! The choice of the device, made once: what there is, what was asked for, and the backend that a job then runs on.

use super::cpu::Cpu;
use super::cuda::Cuda;
use super::probe_cuda::CudaProbe;
use super::probe_wgpu::WgpuProbe;
use super::wgpu::Wgpu;
use super::{cuda, probe_cpu, probe_cuda, probe_wgpu, wgpu};
use crate::error::{Error, Result};
use crate::ops::Plain;
use burn::tensor::DType;
use std::fmt;
use std::str::FromStr;

/// A device as asked for with `--device`: `auto`, `cpu`, `wgpu[:N]` or `cuda[:N]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// CUDA, else a hardware wgpu adapter, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The wgpu adapter of that number; without one the first usable, hardware before software.
    Wgpu(Option<usize>),
    /// The CUDA device of that number; without one the first usable.
    Cuda(Option<usize>),
}

impl FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, number) = match text.split_once(':') {
            Some((name, number)) => (name, Some(number)),
            None => (text, None),
        };
        // cubecl numbers devices in 16 bits.
        let index = number.map(|number| number.parse::<u16>().map(usize::from)).transpose();
        match (name, index) {
            ("auto", Ok(None)) => Ok(Self::Auto),
            ("cpu", Ok(None)) => Ok(Self::Cpu),
            ("wgpu", Ok(index)) => Ok(Self::Wgpu(index)),
            ("cuda", Ok(index)) => Ok(Self::Cuda(index)),
            _ => Err(Error::input(
                format!("unknown device `{text}`"),
                "--device",
                "auto, cpu, wgpu[:N] or cuda[:N]",
            )),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Wgpu(None) => f.write_str("wgpu"),
            Self::Wgpu(Some(index)) => write!(f, "wgpu:{index}"),
            Self::Cuda(None) => f.write_str("cuda"),
            Self::Cuda(Some(index)) => write!(f, "cuda:{index}"),
        }
    }
}

/// The type of activations, as asked for with `--precision`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// 64-bit floats; on the CPU alone.
    F64,
    /// 32-bit floats; on every device.
    F32,
    /// bfloat16; on CUDA alone.
    Bf16,
}

impl Precision {
    /// Burn's name of the type.
    pub fn dtype(self) -> DType {
        match self {
            Self::F64 => DType::F64,
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }
}

impl FromStr for Precision {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "f64" => Ok(Self::F64),
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            _ => Err(Error::input(format!("unknown precision `{text}`"), "--precision", "f64, f32 or bf16")),
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F64 => "f64",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

/// A row of `fairway devices`: a device, or a backend that has none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The device's own name; `-` for a backend without a device.
    pub name: String,
    /// What `--device` calls it, without the number: `cpu`, `wgpu` or `cuda`.
    pub backend: &'static str,
    /// The type of activations there unless `--precision` says otherwise.
    pub precision: Precision,
    /// Bytes of its memory, where they can be told.
    pub memory_bytes: Option<u64>,
    /// Whether work can run on it.
    pub usable: bool,
    /// Its driver; what there is to know about it; why it is missing or cannot be used.
    pub note: String,
}

/// Every device found (in the order of their numbers within a backend), and a row for each backend without one.
pub fn devices() -> Vec<DeviceInfo> {
    let cpu = DeviceInfo {
        name: probe_cpu::name(),
        backend: "cpu",
        precision: Precision::F32,
        memory_bytes: probe_cpu::memory_bytes(),
        usable: true,
        note: "f32 or f64".into(),
    };
    let missing = |backend, precision, note| DeviceInfo {
        name: "-".into(),
        backend,
        precision,
        memory_bytes: None,
        usable: false,
        note,
    };
    let mut rows = vec![cpu];
    let adapters = probe_wgpu::devices();
    if adapters.is_empty() {
        let note = format!("no {} adapter was found", probe_wgpu::interface());
        rows.push(missing("wgpu", Precision::F32, note));
    }
    rows.extend(adapters.into_iter().map(|adapter| DeviceInfo {
        usable: adapter.missing.is_none(),
        note: match (adapter.missing, adapter.software) {
            (Some(missing), _) => format!("cannot be used: {missing}"),
            (None, true) => format!("software renderer: {}", adapter.driver),
            (None, false) => adapter.driver,
        },
        name: adapter.name,
        backend: "wgpu",
        precision: Precision::F32,
        memory_bytes: adapter.memory_bytes,
    }));
    match probe_cuda::devices() {
        Err(why) => rows.push(missing("cuda", Precision::Bf16, why.to_string())),
        Ok(found) => rows.extend(found.iter().map(|device| DeviceInfo {
            name: device.name.clone(),
            backend: "cuda",
            precision: Precision::Bf16,
            memory_bytes: device.memory_bytes,
            usable: device.missing().is_none(),
            note: match device.missing() {
                Some(missing) => format!("cannot be used: {missing}"),
                None => format!(
                    "{}, compute capability {}.{}",
                    device.driver, device.capability.0, device.capability.1
                ),
            },
        })),
    }
    rows
}

/// The device that work runs on, and in which precision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The device: never `Auto`, and always with a number where there may be several.
    pub choice: DeviceChoice,
    /// The type of activations.
    pub precision: Precision,
    /// For people: the choice and the device's own name.
    pub label: String,
    /// Why it was chosen, in a few words.
    pub why: String,
}

/// Decides on a device and a precision, checking that both are to be had.
///
/// Errors (`Error::Input`): a device that is not there names `--device`, a precision that it lacks `--precision`.
pub fn resolve(choice: &DeviceChoice, precision: Option<Precision>) -> Result<Target> {
    Inventory { cuda: &probe_cuda::devices, wgpu: &probe_wgpu::devices }.resolve(*choice, precision)
}

/// What there is to choose from, looked up only as needed: starting Vulkan takes longer than a small job.
struct Inventory<'a> {
    cuda: &'a dyn Fn() -> std::result::Result<&'a [CudaProbe], &'a str>,
    wgpu: &'a dyn Fn() -> Vec<WgpuProbe>,
}

impl Inventory<'_> {
    fn resolve(&self, choice: DeviceChoice, precision: Option<Precision>) -> Result<Target> {
        let why = || "asked for".to_string();
        match choice {
            DeviceChoice::Auto => self.automatic(precision),
            DeviceChoice::Cpu => cpu(precision, why()),
            DeviceChoice::Wgpu(index) => {
                let adapter = self.adapter(index, true).map_err(|reason| self.absent(choice, &reason))?;
                on(DeviceChoice::Wgpu(Some(adapter.0)), adapter.1, precision, why())
            }
            DeviceChoice::Cuda(index) => {
                let device = self.cuda(index).map_err(|reason| self.absent(choice, &reason))?;
                on(DeviceChoice::Cuda(Some(device.0)), device.1, precision, why())
            }
        }
    }

    fn automatic(&self, precision: Option<Precision>) -> Result<Target> {
        if precision == Some(Precision::F64) {
            return cpu(precision, "f64 is computed on the CPU alone".into());
        }
        let no_cuda = match self.cuda(None) {
            Ok((index, name)) => {
                let why = "the best there is: a CUDA device".to_string();
                return on(DeviceChoice::Cuda(Some(index)), name, precision, why);
            }
            Err(reason) => format!("no CUDA device ({reason})"),
        };
        if precision == Some(Precision::Bf16) {
            return Err(Error::input(format!("bf16 without CUDA: {no_cuda}"), "--precision", "f32 or f64"));
        }
        match self.adapter(None, false) {
            Ok((index, name)) => {
                on(DeviceChoice::Wgpu(Some(index)), name, precision, format!("the best there is: {no_cuda}"))
            }
            Err(reason) => cpu(precision, format!("{no_cuda}, no hardware wgpu adapter ({reason})")),
        }
    }

    /// The number and name of a usable CUDA device, or why there is none.
    fn cuda(&self, index: Option<usize>) -> std::result::Result<(usize, String), String> {
        let devices = (self.cuda)().map_err(str::to_string)?;
        let device = |index: usize| {
            let device: &CudaProbe = devices.get(index).ok_or(format!("there are {}", devices.len()))?;
            device.missing().map_or_else(|| Ok((index, device.name.clone())), Err)
        };
        match index {
            Some(index) => device(index),
            None => (0..devices.len())
                .map(device)
                .reduce(|best, next| best.or(next))
                .unwrap_or(Err("there is none".into())),
        }
    }

    /// The number and name of a usable wgpu adapter, or why there is none.
    fn adapter(&self, index: Option<usize>, software: bool) -> std::result::Result<(usize, String), String> {
        let adapters = (self.wgpu)();
        let mut order: Vec<usize> = (0..adapters.len()).collect();
        order.sort_by_key(|&index| adapters[index].rank);
        let adapter = |index: usize| {
            let adapter = adapters.get(index).ok_or(format!("there are {}", adapters.len()))?;
            if adapter.software && !software {
                return Err(format!("{} is a software renderer", adapter.name));
            }
            adapter.missing.clone().map_or_else(|| Ok((index, adapter.name.clone())), Err)
        };
        match index {
            Some(index) => adapter(index),
            None => order
                .into_iter()
                .map(adapter)
                .reduce(|best, next| best.or(next))
                .unwrap_or(Err("none was found".into())),
        }
    }

    /// The error for a device that is not there; it lists those that are.
    fn absent(&self, choice: DeviceChoice, reason: &str) -> Error {
        let mut here = vec!["cpu".to_string()];
        for (index, adapter) in (self.wgpu)().into_iter().enumerate().filter(|(_, a)| a.missing.is_none()) {
            here.push(format!("wgpu:{index} ({})", adapter.name));
        }
        let devices = (self.cuda)().unwrap_or_default().iter().enumerate();
        here.extend(
            devices.filter(|(_, d)| d.missing().is_none()).map(|(i, d)| format!("cuda:{i} ({})", d.name)),
        );
        Error::input(
            format!("no device {choice} ({reason})"),
            "--device",
            format!("one that is here: {}", here.join(", ")),
        )
    }
}

fn cpu(precision: Option<Precision>, why: String) -> Result<Target> {
    on(DeviceChoice::Cpu, probe_cpu::name(), precision, why)
}

/// A target on a device that is there, if it has the precision.
fn on(choice: DeviceChoice, name: String, precision: Option<Precision>, why: String) -> Result<Target> {
    let (known, expected): (&[Precision], _) = match choice {
        DeviceChoice::Auto | DeviceChoice::Cpu => {
            (&[Precision::F32, Precision::F64], "f32 or f64 on the CPU")
        }
        DeviceChoice::Wgpu(_) => (&[Precision::F32], "f32 on wgpu"),
        DeviceChoice::Cuda(_) => (&[Precision::Bf16, Precision::F32], "bf16 or f32 on CUDA"),
    };
    let precision = precision.unwrap_or(known[0]);
    if !known.contains(&precision) {
        return Err(Error::input(format!("no {precision} on {choice}"), "--precision", expected));
    }
    Ok(Target { choice, precision, label: format!("{choice} {name}"), why })
}

/// Work that runs on whichever device was chosen.
pub trait Job {
    /// What it gives.
    type Output;

    /// Does the work on `device` of the backend `B`.
    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<Self::Output>;
}

/// Runs a job on the target's device: the one place where the backend is chosen.
///
/// Errors are the job's own, and `Error::Failed` where the device's driver refuses to start.
pub fn run<J: Job>(target: &Target, job: J) -> Result<J::Output> {
    match target.choice {
        DeviceChoice::Auto => run(&resolve(&DeviceChoice::Auto, Some(target.precision))?, job),
        DeviceChoice::Cpu => job.run::<Cpu>(&burn_ndarray::NdArrayDevice::Cpu, target),
        DeviceChoice::Wgpu(index) => job.run::<Wgpu>(&wgpu::open(index.unwrap_or(0))?, target),
        DeviceChoice::Cuda(index) => job.run::<Cuda>(&cuda::open(index.unwrap_or(0), &target.label)?, target),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(name: &str, major: u32) -> CudaProbe {
        CudaProbe {
            name: name.into(),
            memory_bytes: Some(1),
            capability: (major, 0),
            driver: "CUDA 13.0".into(),
        }
    }

    fn adapter(name: &str, rank: usize) -> WgpuProbe {
        WgpuProbe {
            name: name.into(),
            memory_bytes: None,
            driver: "driver".into(),
            software: rank == 4,
            rank,
            missing: None,
        }
    }

    /// Resolves on a machine with the given devices.
    fn choose(
        choice: &str,
        precision: Option<Precision>,
        gpus: &[CudaProbe],
        adapters: &[WgpuProbe],
    ) -> Result<Target> {
        let cuda = || if gpus.is_empty() { Err("libcuda is not there") } else { Ok(gpus) };
        let wgpu = || adapters.to_vec();
        Inventory { cuda: &cuda, wgpu: &wgpu }.resolve(choice.parse()?, precision)
    }

    #[test]
    fn auto_takes_cuda_then_hardware_then_the_cpu() {
        let (h100, lavapipe, radeon) = (gpu("H100", 9), adapter("llvmpipe", 4), adapter("Radeon", 0));
        let target =
            choose("auto", None, std::slice::from_ref(&h100), std::slice::from_ref(&radeon)).unwrap();
        assert_eq!((target.choice, target.precision), (DeviceChoice::Cuda(Some(0)), Precision::Bf16));
        assert_eq!(target.label, "cuda:0 H100");
        let target = choose("auto", None, &[], &[lavapipe.clone(), adapter("Iris", 1), radeon]).unwrap();
        assert_eq!((target.choice, target.precision), (DeviceChoice::Wgpu(Some(2)), Precision::F32));
        assert!(target.why.contains("libcuda is not there"), "{}", target.why);
        let target = choose("auto", None, &[], std::slice::from_ref(&lavapipe)).unwrap();
        assert_eq!((target.choice, target.precision), (DeviceChoice::Cpu, Precision::F32));
        assert!(target.why.contains("llvmpipe is a software renderer"), "{}", target.why);
        assert_eq!(choose("auto", None, &[], &[]).unwrap().choice, DeviceChoice::Cpu);
        // A GPU that is too old is none.
        assert_eq!(choose("auto", None, &[gpu("V100", 7)], &[]).unwrap().choice, DeviceChoice::Cpu);
        let target = choose("auto", None, &[gpu("V100", 7), h100], &[]).unwrap();
        assert_eq!(target.choice, DeviceChoice::Cuda(Some(1)));
    }

    #[test]
    fn an_explicit_wgpu_takes_a_software_renderer_last() {
        let adapters = [adapter("llvmpipe", 4), adapter("Radeon", 0)];
        assert_eq!(choose("wgpu", None, &[], &adapters).unwrap().choice, DeviceChoice::Wgpu(Some(1)));
        assert_eq!(choose("wgpu:0", None, &[], &adapters).unwrap().choice, DeviceChoice::Wgpu(Some(0)));
        assert_eq!(choose("wgpu", None, &[], &adapters[..1]).unwrap().choice, DeviceChoice::Wgpu(Some(0)));
    }

    #[test]
    fn a_device_that_is_not_there_is_named_with_those_that_are() {
        let error = choose("cuda", None, &[], &[adapter("Radeon", 0)]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "no device cuda (libcuda is not there), --device, expected one that is here: cpu, wgpu:0 (Radeon)"
        );
        assert_eq!(error.exit_code(), 2);
        let error = choose("cuda:3", None, &[gpu("H100", 9)], &[]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "no device cuda:3 (there are 1), --device, expected one that is here: cpu, cuda:0 (H100)"
        );
        let error = choose("wgpu", None, &[], &[]).unwrap_err().to_string();
        assert_eq!(error, "no device wgpu (none was found), --device, expected one that is here: cpu");
        let unusable = WgpuProbe { missing: Some("no compute shaders".into()), ..adapter("old", 0) };
        assert!(
            choose("wgpu", None, &[], &[unusable]).unwrap_err().to_string().contains("no compute shaders")
        );
    }

    #[test]
    fn a_precision_is_only_where_it_can_be_computed() {
        let (gpus, adapters) = ([gpu("H100", 9)], [adapter("Radeon", 0)]);
        let choose = |device, precision| choose(device, Some(precision), &gpus, &adapters);
        for (device, precision) in [
            ("cpu", Precision::F64),
            ("cpu", Precision::F32),
            ("wgpu", Precision::F32),
            ("cuda", Precision::F32),
            ("cuda", Precision::Bf16),
        ] {
            assert_eq!(choose(device, precision).unwrap().precision, precision);
        }
        for (device, precision) in [
            ("cpu", Precision::Bf16),
            ("wgpu", Precision::F64),
            ("wgpu", Precision::Bf16),
            ("cuda", Precision::F64),
        ] {
            let error = choose(device, precision).unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains("--precision"), "{error}");
        }
        assert_eq!(choose("auto", Precision::F64).unwrap().choice, DeviceChoice::Cpu);
        assert_eq!(choose("auto", Precision::F32).unwrap().choice, DeviceChoice::Cuda(Some(0)));
    }

    #[test]
    fn bf16_without_cuda_says_why() {
        let error = choose("auto", Some(Precision::Bf16), &[], &[]).unwrap_err().to_string();
        assert!(error.contains("libcuda is not there") && error.contains("--precision"), "{error}");
    }
}
