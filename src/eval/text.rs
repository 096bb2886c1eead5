//! Weights in host memory at work on a device that is chosen at run time: text continued, tokens scored.

use super::method::Method;
use super::sample::{self, Options};
use super::tally::{Score, Text};
use crate::backend::{self, Job, Target};
use crate::data::tokenizer::Tokenizer;
use crate::error::Result;
use crate::host::HostTensor;
use crate::model::{AHEAD, Model};
use crate::ops::Plain;
use crate::recipe::Recipe;
use std::time::Instant;

/// A trained model in host memory.
#[derive(Debug, Clone, Copy)]
pub struct Weights<'a> {
    /// The model's recipe.
    pub recipe: &'a Recipe,
    /// Its parameters.
    pub params: &'a [HostTensor],
    /// The file that they came from, for errors.
    pub place: &'a str,
}

impl Weights<'_> {
    /// The model on a device.
    pub(crate) fn model<P: Plain>(&self, device: &P::Device, target: &Target) -> Result<Model<P>> {
        let model = Model::<P>::new(self.recipe, device, target.precision.dtype())?;
        model.params().load(self.params, self.place)?;
        Ok(model)
    }
}

/// A continued text and how fast it came.
#[derive(Debug, Clone, PartialEq)]
pub struct Continued {
    /// Prompt and continuation.
    pub text: String,
    /// Tokens drawn per second, the prompt's reading included.
    pub tokens_per_s: f64,
}

/// Continues `prompt` on the target. `on_text` is given prompt and continuation in whole characters as they come; an
/// error that it returns stops the work.
///
/// Errors (input): weights that are not the recipe's, options or a prompt that [`sample::sample`] refuses. Bytes that are
/// not UTF-8, as an untrained model writes them, come as U+FFFD.
pub fn continue_text(
    weights: Weights,
    tokenizer: &Tokenizer,
    prompt: &str,
    options: &Options,
    target: &Target,
    on_text: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<Continued> {
    let job = SampleJob { weights, tokenizer, prompt, options, on_text };
    backend::guard(target, || backend::run(target, job))
}

struct SampleJob<'a> {
    weights: Weights<'a>,
    tokenizer: &'a Tokenizer,
    prompt: &'a str,
    options: &'a Options,
    on_text: &'a mut dyn FnMut(&str) -> Result<()>,
}

impl Job for SampleJob<'_> {
    type Output = Continued;

    fn run<P: Plain>(self, device: &P::Device, target: &Target) -> Result<Continued> {
        let model = self.weights.model::<P>(device, target)?;
        let mut prompt = vec![self.tokenizer.bos()];
        self.tokenizer.encode_into(self.prompt, &mut prompt);
        let started = Instant::now();
        let (mut ids, mut shown) = (prompt.clone(), 0);
        let mut on_token = |id| {
            ids.push(id);
            let bytes = self.tokenizer.decode(&ids);
            // What may still be a character's first bytes waits for the rest.
            let whole = whole_characters(&bytes).max(shown);
            let part = String::from_utf8_lossy(&bytes[shown..whole]);
            shown = whole;
            (self.on_text)(&part)
        };
        let new = sample::sample(&model, &prompt, self.options, &mut on_token)?;
        let seconds = started.elapsed().as_secs_f64();
        let bytes = self.tokenizer.decode(&ids);
        (self.on_text)(&String::from_utf8_lossy(&bytes[shown..]))?;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        Ok(Continued { text, tokens_per_s: new.len() as f64 / seconds })
    }
}

/// Length of `bytes` without an unfinished UTF-8 character at its end.
fn whole_characters(bytes: &[u8]) -> usize {
    let tail = &bytes[bytes.len().saturating_sub(4)..];
    match tail.iter().rposition(|byte| byte & 0xC0 != 0x80) {
        // An unfinished character is one that ends too early, not one that is wrong.
        Some(lead) => match std::str::from_utf8(&tail[lead..]) {
            Err(error) if error.error_len().is_none() => bytes.len() - (tail.len() - lead),
            _ => bytes.len(),
        },
        None => bytes.len(),
    }
}

/// Scores a text on the target as `method` says. `progress` is told (windows done, windows in all); an error that it
/// returns stops the work.
///
/// Errors (input): weights that are not the recipe's, windows that do not fit the text.
pub fn score(
    weights: Weights,
    text: &Text,
    method: &Method,
    target: &Target,
    progress: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<Score> {
    let job = ScoreJob { weights, text, method, progress };
    backend::guard(target, || backend::run(target, job))
}

struct ScoreJob<'a> {
    weights: Weights<'a>,
    text: &'a Text<'a>,
    method: &'a Method,
    progress: &'a mut dyn FnMut(usize, usize) -> Result<()>,
}

impl Job for ScoreJob<'_> {
    type Output = Score;

    fn run<P: Plain>(self, device: &P::Device, target: &Target) -> Result<Score> {
        // Heads that only training uses would train here too.
        let recipe = Recipe { mtp_num_heads: 0, ..self.weights.recipe.clone() };
        let params: Vec<HostTensor>;
        let mut weights = Weights { recipe: &recipe, ..self.weights };
        if self.weights.params.iter().any(|param| param.name.starts_with(AHEAD)) {
            let kept = weights.params.iter().filter(|param| !param.name.starts_with(AHEAD));
            params = kept.cloned().collect();
            weights.params = &params;
        }
        let model = weights.model::<P>(device, target)?;
        self.method.score(&model, &recipe, self.text, self.progress)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unfinished_character_waits_and_a_wrong_one_does_not() {
        let text = "aé€😀".as_bytes();
        let whole: Vec<usize> = (0..=text.len()).map(|len| whole_characters(&text[..len])).collect();
        assert_eq!(whole, [0, 1, 1, 3, 3, 3, 6, 6, 6, 6, 10]);
        for wrong in [&b"a\xff"[..], b"\x80\x80\x80\x80\x80", b"\xe2\x41", b"\xc0\x80", b"\xf5\x80"] {
            assert_eq!(whole_characters(wrong), wrong.len(), "{wrong:?}");
        }
    }
}
