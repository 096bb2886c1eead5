//! Quantisation of a trained model: what it costs in bits per byte, rounded to nearest and by GPTQ, calibrated with what the
//! model writes itself. A model in small that learns a page of this program's sources by heart, in some seconds on the CPU:
//! what it knows then is in its weights' digits.

use fairway::artifact::assemble::Prepared;
use fairway::artifact::{Artifact, Codec};
use fairway::backend::{DeviceChoice, Target, resolve};
use fairway::calibrate::{self, Calibration, Generation, Sequences};
use fairway::data::byte_table::ByteTable;
use fairway::data::folder::DataFolder;
use fairway::data::pack::{PackOptions, pack};
use fairway::data::stream::ValTokens;
use fairway::data::{quiet, tokenizer::Tokenizer};
use fairway::eval::method::Method;
use fairway::eval::sliding::Pass;
use fairway::eval::tally::Text;
use fairway::eval::text::{self, Weights};
use fairway::host::HostTensor;
use fairway::quant::{Scheme, Storage, TensorLoss};
use fairway::recipe::Recipe;
use fairway::train::{self, Options, log, run::TrainedRun};
use std::fs;
use std::path::Path;

/// Width 264, so that every matrix of a block has more than 65,536 elements and is coded.
fn recipe() -> Recipe {
    Recipe {
        model_dim: 264,
        num_layers: 2,
        num_heads: 4,
        num_kv_heads: 4,
        train_batch_tokens: 512,
        iterations: 160,
        warmdown_iters: 80,
        val_loss_every: 0,
        val_tokens: PAGE,
        ..Recipe::load("tiny").unwrap()
    }
}

/// Bytes of the page.
const PAGE: usize = 4096;

fn page() -> String {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/quant/gptq.rs");
    let mut text = fs::read_to_string(source).unwrap();
    text.retain(|character| character.is_ascii());
    text.truncate(PAGE);
    assert_eq!(text.len(), PAGE);
    text
}

struct Trained {
    _place: tempfile::TempDir,
    run: TrainedRun,
    data: DataFolder,
    val: ValTokens,
    table: ByteTable,
    target: Target,
}

impl Trained {
    fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        let path = |name: &str| place.path().join(name);
        fs::write(path("val.txt"), page()).unwrap();
        fs::write(path("train.txt"), page().repeat(4)).unwrap();
        let files = vec![path("val.txt"), path("train.txt")];
        pack(&PackOptions { val_docs: Some(1), ..PackOptions::new(files, "byte", path("data")) }, &quiet)
            .unwrap();
        let recipe = recipe();
        let target = resolve(&DeviceChoice::Cpu, None).unwrap();
        let options = Options {
            recipe: recipe.clone(),
            data: path("data"),
            tokenizer: Tokenizer::byte(),
            tokenizer_name: "byte".into(),
            out: path("run"),
            resume: None,
            micro_batch: None,
            save_every: 0,
            echo: log::to_nowhere(),
            warn: log::to_nowhere(),
        };
        train::train(options, &target, &mut |_| ()).unwrap();
        let run = TrainedRun::load(&path("run"), &mut |_| ()).unwrap();
        let data = DataFolder::open(&path("data")).unwrap();
        let val = data.val(recipe.train_seq_len, recipe.vocab_size).unwrap().limit(PAGE);
        let table = ByteTable::new(&run.tokenizer, recipe.vocab_size).unwrap();
        Self { _place: place, run, data, val, table, target }
    }

    fn bpb(&self, params: &[HostTensor]) -> f64 {
        let weights = Weights { recipe: &self.run.recipe, params, place: "the test" };
        let text = Text { tokens: self.val.tokens(), table: &self.table };
        let pass = Pass { seq_len: self.val.seq_len(), batch_tokens: 2048, temperature: 1.0 };
        let method = Method::full(pass);
        text::score(weights, &text, &method, &self.target, &mut |_, _| Ok(())).unwrap().val_bpb
    }

    /// The score of an artifact through its file.
    fn reloaded(&self, artifact: &Artifact) -> f64 {
        let file = tempfile::NamedTempFile::new().unwrap();
        artifact.write(file.path(), Codec::Zlib).unwrap();
        let read = Artifact::read(file.path()).unwrap();
        assert_eq!(read.tensors, artifact.tensors);
        self.bpb(&read.contents("the test").unwrap().params)
    }

    fn prepared(&self, scheme: Scheme) -> Prepared {
        Prepared::new(&self.run.recipe, &self.run.params, scheme).unwrap()
    }

    fn calibrated(&self, bits: u8, calibration: &Calibration) -> Prepared {
        let prepared = self.prepared(Scheme::Gptq(bits));
        let recipe = &self.run.recipe;
        let weights = Weights { recipe, params: &self.run.params, place: "the test" };
        let wanted = |name: &str| prepared.takes_hessian(name);
        let run = calibrate::run(weights, calibration, &wanted, &self.target, &mut |_, _, _| Ok(())).unwrap();
        // The six matrices of each block, and the tied embedding.
        assert_eq!(run.hessians.len(), 2 * 6 + 1);
        prepared.with_hessians(run.hessians)
    }
}

/// The losses of the outputs of the matrices that are coded in fewer than 8 bits.
fn outputs(losses: &[TensorLoss]) -> Vec<(String, f64)> {
    let narrow = losses.iter().filter(|loss| loss.storage.starts_with("int") && loss.storage != "int8/row");
    narrow.map(|loss| (loss.name.clone(), loss.relative_output.expect("a Hessian"))).collect()
}

#[test]
fn gptq_of_a_trained_model_beats_rounding_to_nearest() {
    let trained = Trained::new();
    let live = trained.bpb(&trained.run.params);
    // Bytes at random have 8 bits each, those of a source some 4.8 by their frequencies.
    assert!(live < 2.5, "live {live}");
    let own = Calibration::Own(Generation::of(&trained.run.recipe));
    let recipe = &trained.run.recipe;
    let read = Sequences::of_data(&trained.data, recipe.vocab_size, 32, recipe.train_seq_len).unwrap();
    println!("val_bpb: live {live:.5}");
    let mut lost = Vec::new();
    for bits in [6, 4] {
        let calibrated = trained.calibrated(bits, &own);
        let plain = trained.prepared(Scheme::Int(bits)).artifact(&trained.run.tokenizer).unwrap();
        let gptq = calibrated.artifact(&trained.run.tokenizer).unwrap();
        assert!(gptq.tensors.iter().filter(|t| t.storage == Storage::IntRow(bits)).count() == 12);
        let by_data = trained.calibrated(bits, &Calibration::Given(read.clone()));
        let by_data = by_data.artifact(&trained.run.tokenizer).unwrap();
        let [nearest, own, data] =
            [&plain, &gptq, &by_data].map(|artifact| trained.reloaded(artifact) - live);
        println!(
            "int{bits}: nearest {nearest:+.5}, GPTQ by its own text {own:+.5}, by training data {data:+.5}"
        );
        // Each layer's output too, under the Hessian.
        let before = outputs(&calibrated.losses(&plain).unwrap());
        let after = outputs(&calibrated.losses(&gptq).unwrap());
        assert_eq!((before.len(), after.len()), (12, 12));
        for ((name, before), (_, after)) in before.iter().zip(&after) {
            println!("int{bits} {name}: output {before:.5} to nearest, {after:.5} by GPTQ");
            assert!(after < before, "int{bits} {name}: {after} {before}");
        }
        lost.push([nearest, own, data]);
    }
    let [[nearest6, own6, data6], [nearest4, own4, data4]] = lost[..] else { unreachable!() };
    assert!(own6 < 0.01 && data6 < 0.01 && data6 < nearest6, "int6: {nearest6} {own6} {data6}");
    assert!(own4 < nearest4 && data4 < nearest4, "int4: {nearest4} {own4} {data4}");
}

#[test]
fn a_model_that_is_quantised_twice_gives_the_same_codes() {
    // Untrained, one layer: calibration and codes are decided by the seed.
    let target = resolve(&DeviceChoice::Cpu, None).unwrap();
    let recipe = Recipe { num_layers: 1, train_seq_len: 32, tied_embed_init_std: 0.5, ..recipe() };
    let model = fairway::model::Model::<fairway::backend::cpu::Cpu>::new(
        &recipe,
        &burn_ndarray::NdArrayDevice::Cpu,
        target.precision.dtype(),
    )
    .unwrap();
    let params = model.params().to_host().unwrap();
    let codes = |seed: u64| {
        let prepared = Prepared::new(&recipe, &params, Scheme::Gptq(3)).unwrap();
        let own = Calibration::Own(Generation { seed, sequences: 6, ..Generation::of(&recipe) });
        let weights = Weights { recipe: &recipe, params: &params, place: "the test" };
        let wanted = |name: &str| prepared.takes_hessian(name);
        let run = calibrate::run(weights, &own, &wanted, &target, &mut |_, _, _| Ok(())).unwrap();
        prepared.with_hessians(run.hessians).artifact(&Tokenizer::byte()).unwrap()
    };
    let first = codes(1);
    assert_eq!(first, codes(1));
    assert_ne!(first, codes(2));
    // Without Hessians the scheme is refused where none can be asked for.
    let refused = Artifact::assemble(&recipe, &Tokenizer::byte(), &params, Scheme::Gptq(3)).unwrap_err();
    assert!(refused.to_string().contains("calibration"), "{refused}");
}
