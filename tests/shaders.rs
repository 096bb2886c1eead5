//! Every WGSL kernel, in each form that a call can give it, is valid and translates to what the drivers take.

use fairway::backend::wgpu::shaders;
use naga::back::{msl, spv};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use naga::{Module, ShaderStage};
use std::collections::BTreeSet;

fn parse(file: &str, text: &str) -> (Module, ModuleInfo) {
    let module = naga::front::wgsl::parse_str(text)
        .unwrap_or_else(|error| panic!("{file} does not parse:\n{}", error.emit_to_string(text)));
    // No capabilities: nothing beyond what every WebGPU adapter has.
    let info = Validator::new(ValidationFlags::all(), Capabilities::empty())
        .validate(&module)
        .unwrap_or_else(|error| panic!("{file} is not valid:\n{}", error.emit_to_string(text)));
    (module, info)
}

#[test]
fn every_form_of_every_shader_is_valid_and_translates() {
    let mut forms = 0;
    for (file, entry, text) in shaders() {
        assert!(!text.contains("{{"), "{file}: a placeholder without a value");
        let (module, info) = parse(file, &text);
        let found = module.entry_points.iter().any(|e| e.name == entry && e.stage == ShaderStage::Compute);
        assert!(found, "{file} has no compute entry point {entry}");

        let pipeline = spv::PipelineOptions { entry_point: entry.into(), shader_stage: ShaderStage::Compute };
        let words = spv::write_vec(&module, &info, &spv::Options::default(), Some(&pipeline))
            .unwrap_or_else(|error| panic!("{file} {entry} to SPIR-V: {error}"));
        assert_eq!(words[0], 0x0723_0203, "{file}: SPIR-V begins with its magic number");

        let options = msl::Options { fake_missing_bindings: true, ..Default::default() };
        let pipeline = msl::PipelineOptions::default();
        let (metal, names) = msl::write_string(&module, &info, &options, &pipeline)
            .unwrap_or_else(|error| panic!("{file} {entry} to MSL: {error}"));
        assert!(metal.contains("kernel void") && names.entry_point_names.iter().all(Result::is_ok), "{file}");
        forms += 1;
    }
    println!("{forms} forms");
    assert!(forms > 0);
}

#[test]
fn every_shader_file_is_checked() {
    let checked: BTreeSet<String> = shaders().into_iter().map(|(file, ..)| file.to_string()).collect();
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("wgsl");
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files: BTreeSet<String> = files
        .filter(|path| path.extension().is_some_and(|extension| extension == "wgsl"))
        .map(|path| path.file_name().unwrap().to_str().unwrap().to_string())
        .collect();
    assert_eq!(checked, files);
}

#[test]
fn storage_is_read_write_and_bindings_of_an_entry_point_are_numbered_without_gaps() {
    for (file, entry, text) in shaders() {
        let (module, info) = parse(file, &text);
        let index = module.entry_points.iter().position(|e| e.name == entry).unwrap();
        let used = info.get_entry_point(index);
        let mut numbers = Vec::new();
        for (handle, global) in module.global_variables.iter() {
            let Some(binding) = global.binding.as_ref().filter(|_| !used[handle].is_empty()) else {
                continue;
            };
            assert_eq!(binding.group, 0, "{file}");
            numbers.push(binding.binding);
            if let naga::AddressSpace::Storage { access } = global.space {
                let both = naga::StorageAccess::LOAD | naga::StorageAccess::STORE;
                assert_eq!(access, both, "{file}: pooled buffers allow no other access");
            }
        }
        numbers.sort_unstable();
        let expected: Vec<u32> = (0..numbers.len() as u32).collect();
        assert_eq!(numbers, expected, "{file} {entry}");
    }
}
