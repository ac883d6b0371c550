//! YAML. No other file names the YAML crate, so that replacing it is a change of this one.

use serde::Serialize;
use serde::de::DeserializeOwned;
pub use serde_yaml::{Mapping, Value, from_value, to_value};

/// Text that is not the YAML that was expected: what is wrong, and in which line.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct YamlError {
    message: String,
}

impl YamlError {
    /// The message about a value that has no line worth naming, such as a flag's.
    pub fn without_line(&self) -> &str {
        self.message.split(" at line ").next().unwrap_or(&self.message)
    }
}

/// Reads a value from YAML text.
///
/// # Errors
/// Text of another form; the message is in a user's words and names the line.
pub fn parse<T: DeserializeOwned>(text: &str) -> Result<T, YamlError> {
    serde_yaml::from_str(text).map_err(|error| YamlError { message: with_line(&error, text) })
}

/// Writes a value as YAML text.
///
/// # Errors
/// A value that YAML has no form for.
pub fn to_text(value: &impl Serialize) -> Result<String, YamlError> {
    serde_yaml::to_string(value).map_err(|error| YamlError { message: error.to_string() })
}

/// The parser's message in a user's words, with the line. serde_yaml leaves that out for an unknown section, so it is
/// looked up in the text.
fn with_line(error: &serde_yaml::Error, text: &str) -> String {
    let message = in_plain_words(&error.to_string());
    if message.contains(" at line ") {
        return message;
    }
    let Some(key) = message.split('`').nth(1) else { return message };
    let mut lines = (1..).zip(text.lines()).filter(|(_, line)| names(line, key)).map(|(number, _)| number);
    // Of a key that stands twice, the second is the mistake.
    let line: Option<usize> = if message.starts_with("duplicate") { lines.nth(1) } else { lines.next() };
    match line {
        Some(number) => format!("{message} at line {number}"),
        None => message,
    }
}

/// Whether `line` begins with the section `key`.
fn names(line: &str, key: &str) -> bool {
    let line = line.trim_start_matches(['"', '\'', '{', ' ']);
    line.strip_prefix(key).is_some_and(|rest| rest.trim_start_matches(['"', '\'', ' ']).starts_with(':'))
}

/// The line, from 1, at which `text` sets `section.key`.
pub(super) fn line_of(text: &str, section: &str, key: &str) -> Option<usize> {
    let lines = (1..).zip(text.lines()).skip_while(|(_, line)| !names(line, section));
    let sets = |line: &str| line.split(['{', ',']).any(|part| names(part, key));
    let mut lines = lines.map(|(number, line)| (number, line.split_once('#').map_or(line, |(code, _)| code)));
    lines.find(|(_, line)| sets(line.trim_start_matches(section).trim_start_matches(':'))).map(|(number, _)| number)
}

/// serde's words for Rust's types, and what they are called in a configuration.
const TYPES: [(&str, &str); 13] = [
    ("expected struct Config", "expected sections of keys, as in `train: {steps: 100}`"),
    ("expected struct ModelConfig", SECTION),
    ("expected struct QuantConfig", SECTION),
    ("expected struct DataConfig", SECTION),
    ("expected struct OptimConfig", SECTION),
    ("expected struct TrainConfig", SECTION),
    ("expected struct DdpConfig", SECTION),
    ("expected a YAML tag starting with '!'", "expected one of its names"),
    ("expected f64", "expected a number"),
    ("expected i64", "expected a whole number"),
    ("expected u64", "expected a whole number, not below 0"),
    ("expected usize", "expected a whole number, not below 0"),
    ("expected a tuple of size 2", "expected two values, as in [0.9, 0.95]"),
];

const SECTION: &str = "expected keys with values";

fn in_plain_words(message: &str) -> String {
    let mut text = message.replace("invalid type: unit value", "invalid type: nothing");
    for (rust, plain) in TYPES {
        text = text.replace(rust, plain);
    }
    text
}
