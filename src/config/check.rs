//! Checks of a value's range. Each error names the key.

use super::error::{ConfigError, invalid};

pub(super) fn at_least(key: &str, value: i64, least: i64) -> Result<(), ConfigError> {
    if value < least {
        return Err(invalid(key, format!("{value} is less than {least}")));
    }
    Ok(())
}

pub(super) fn positive(key: &str, value: f64) -> Result<(), ConfigError> {
    if !(value > 0.0 && value.is_finite()) {
        return Err(invalid(key, format!("{value} is not a number above 0")));
    }
    Ok(())
}

pub(super) fn within(key: &str, value: f64, range: std::ops::Range<f64>) -> Result<(), ConfigError> {
    if !range.contains(&value) {
        let upper = if range.end == f64::MAX { "up".into() } else { format!("below {}", range.end) };
        return Err(invalid(key, format!("{value} is not within {} and {upper}", range.start)));
    }
    Ok(())
}

pub(super) fn up_to_one(key: &str, value: f64) -> Result<(), ConfigError> {
    if !(0.0..=1.0).contains(&value) {
        return Err(invalid(key, format!("{value} is not within 0 and 1")));
    }
    Ok(())
}
