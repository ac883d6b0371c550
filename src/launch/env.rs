//! What a launcher tells a process of its place among the others, in the environment variables of torchrun
//! (<https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables>).

use std::str::FromStr;

/// The place of this process among those that train together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankEnv {
    /// Number of this process, from 0: `RANK`.
    pub rank: usize,
    /// Its number on this machine, and so the number of its GPU: `LOCAL_RANK`, 0 where that is missing.
    pub local_rank: usize,
    /// Number of processes in all: `WORLD_SIZE`.
    pub world_size: usize,
    /// Number of them on this machine: `LOCAL_WORLD_SIZE`, 1 where that is missing.
    pub local_world_size: usize,
    /// Where the store is: `MASTER_ADDR`.
    pub master_addr: String,
    /// Its port: `MASTER_PORT`.
    pub master_port: u16,
    /// Whether the launcher holds the store (`TORCHELASTIC_USE_AGENT_STORE`); else rank 0 does.
    pub agent_store: bool,
    /// How often the launcher has restarted the run: `TORCHELASTIC_RESTART_COUNT`.
    pub restart_count: u64,
}

/// Variables that make no sense.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum EnvError {
    /// One is missing, though a launcher's variables were asked for.
    #[error(
        "{0} is not set, but --ddp needs torchrun's variables: start with `torchrun --no-python … bbt train …` or `bbt launch … -- train …`"
    )]
    Missing(&'static str),
    /// One has a value that it cannot have.
    #[error("{name}={value}: {expected}")]
    Malformed {
        /// The variable.
        name: &'static str,
        /// Its value.
        value: String,
        /// What it should be.
        expected: String,
    },
    /// The same, where nobody asked for more than one process: some variables are set, perhaps left by a launcher.
    #[error(
        "{problem}; it counts because {set} are set: `unset {set}` to train as one process, or start with `torchrun --no-python … bbt train …` or `bbt launch … -- train …`"
    )]
    Leftover {
        /// What is wrong.
        problem: String,
        /// The variables that are set, one after another.
        set: String,
    },
}

/// The variables that say which process of how many this one is, and where they meet.
const PLACE: [&str; 4] = ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"];

impl RankEnv {
    /// This process's place, from its environment. A variable without a value counts as not set. Without `required`
    /// (`--ddp`) the place is none where `RANK` or `WORLD_SIZE` is not set, or where they say that this is the only
    /// process and nothing says where to meet: a launcher that ended may have left them.
    ///
    /// # Errors
    /// A variable that is missing or malformed.
    pub fn from_env(required: bool) -> Result<Option<Self>, EnvError> {
        Self::find(required, |name| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned()))
    }

    fn find(required: bool, lookup: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, EnvError> {
        if required {
            return Self::read(lookup).map(Some);
        }
        let is_set = |name: &str| given(&lookup, name).is_some();
        if !is_set("RANK") || !is_set("WORLD_SIZE") {
            return Ok(None);
        }
        let is = |name, number: &str| given(&lookup, name).is_some_and(|value| value.trim() == number);
        if is("RANK", "0") && is("WORLD_SIZE", "1") && !(is_set("MASTER_ADDR") && is_set("MASTER_PORT")) {
            return Ok(None);
        }
        Self::read(&lookup).map(Some).map_err(|error| EnvError::Leftover {
            problem: match &error {
                EnvError::Missing(name) => format!("{name} is not set"),
                other => other.to_string(),
            },
            set: PLACE.into_iter().filter(|name| is_set(name)).collect::<Vec<_>>().join(" "),
        })
    }

    /// The same from any source of variables.
    ///
    /// # Errors
    /// As [`RankEnv::from_env`].
    pub fn read(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, EnvError> {
        let world_size: usize = number(&lookup, "WORLD_SIZE", None)?;
        if world_size == 0 {
            return Err(malformed("WORLD_SIZE", "0", "at least one process trains"));
        }
        let rank = below(&lookup, "RANK", None, world_size, "WORLD_SIZE")?;
        let local_world_size = number(&lookup, "LOCAL_WORLD_SIZE", Some(1))?;
        let local_rank = match given(&lookup, "LOCAL_WORLD_SIZE") {
            Some(_) => below(&lookup, "LOCAL_RANK", None, local_world_size, "LOCAL_WORLD_SIZE")?,
            None => below(&lookup, "LOCAL_RANK", Some(0), world_size, "WORLD_SIZE")?,
        };
        let master_addr = given(&lookup, "MASTER_ADDR").ok_or(EnvError::Missing("MASTER_ADDR"))?;
        let master_port = number(&lookup, "MASTER_PORT", None)?;
        if master_port == 0 {
            return Err(malformed("MASTER_PORT", "0", "must be a port that every rank can know, from 1 to 65535"));
        }
        Ok(Self {
            rank,
            local_rank,
            world_size,
            local_world_size,
            master_addr,
            master_port,
            // torchrun writes Python's True.
            agent_store: given(&lookup, "TORCHELASTIC_USE_AGENT_STORE").is_some_and(|v| v.eq_ignore_ascii_case("true")),
            restart_count: number(&lookup, "TORCHELASTIC_RESTART_COUNT", Some(0))?,
        })
    }
}

/// The value of a variable that is set and not empty.
fn given(lookup: &impl Fn(&str) -> Option<String>, name: &str) -> Option<String> {
    lookup(name).filter(|value| !value.trim().is_empty())
}

fn malformed(name: &'static str, value: &str, expected: impl Into<String>) -> EnvError {
    EnvError::Malformed { name, value: value.into(), expected: expected.into() }
}

fn number<T: FromStr>(
    lookup: &impl Fn(&str) -> Option<String>,
    name: &'static str,
    default: Option<T>,
) -> Result<T, EnvError> {
    match (given(lookup, name), default) {
        (Some(value), _) => value.trim().parse().map_err(|_| {
            let largest = if size_of::<T>() == 2 { " up to 65535" } else { "" };
            malformed(name, &value, format!("must be a whole number{largest}"))
        }),
        (None, Some(default)) => Ok(default),
        (None, None) => Err(EnvError::Missing(name)),
    }
}

fn below(
    lookup: &impl Fn(&str) -> Option<String>,
    name: &'static str,
    default: Option<usize>,
    end: usize,
    end_name: &str,
) -> Result<usize, EnvError> {
    let value = number(lookup, name, default)?;
    if value >= end {
        return Err(malformed(name, &value.to_string(), format!("ranks count from 0 and stay below {end_name}={end}")));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: [(&str, &str); 8] = [
        ("RANK", "3"),
        ("LOCAL_RANK", "1"),
        ("WORLD_SIZE", "4"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("MASTER_ADDR", "node0"),
        ("MASTER_PORT", "29500"),
        ("TORCHELASTIC_USE_AGENT_STORE", "True"),
        ("TORCHELASTIC_RESTART_COUNT", "2"),
    ];

    /// Reads WHOLE with some variables replaced, or taken out.
    fn read(changes: &[(&str, Option<&str>)]) -> Result<RankEnv, EnvError> {
        RankEnv::read(|name| match changes.iter().find(|(n, _)| *n == name) {
            Some((_, value)) => value.map(String::from),
            None => WHOLE.iter().find(|(n, _)| *n == name).map(|(_, value)| value.to_string()),
        })
    }

    #[test]
    fn torchruns_variables_are_read() {
        let env = read(&[]).unwrap();
        assert_eq!((env.rank, env.local_rank, env.world_size, env.local_world_size), (3, 1, 4, 2));
        assert_eq!((env.master_addr.as_str(), env.master_port), ("node0", 29500));
        assert_eq!((env.agent_store, env.restart_count), (true, 2));
        let bare = read(&[("LOCAL_RANK", None), ("LOCAL_WORLD_SIZE", None), ("TORCHELASTIC_USE_AGENT_STORE", None)]);
        let bare = bare.unwrap();
        assert_eq!((bare.local_rank, bare.local_world_size, bare.agent_store), (0, 1, false));
    }

    /// Finds the place among these variables.
    fn find(required: bool, variables: &[(&str, &str)]) -> Result<Option<RankEnv>, EnvError> {
        RankEnv::find(required, |name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.to_string()))
    }

    #[test]
    fn what_a_launcher_left_behind_makes_one_process_or_is_named() {
        for alone in [
            &[][..],
            &[("WORLD_SIZE", "8")],
            &[("RANK", "0")],
            &[("RANK", ""), ("WORLD_SIZE", " ")],
            &[("RANK", "0"), ("WORLD_SIZE", "1")],
            &[("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "node0"), ("MASTER_PORT", "")],
        ] {
            assert_eq!(find(false, alone), Ok(None), "{alone:?}");
            assert!(find(true, alone).unwrap_err().to_string().contains("--ddp"), "{alone:?}");
        }
        let one = [("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "node0"), ("MASTER_PORT", "1")];
        assert_eq!(find(false, &one).unwrap().map(|env| env.world_size), Some(1));
        for (variables, problem, unset) in [
            (&[("RANK", "0"), ("WORLD_SIZE", "2")][..], "MASTER_ADDR is not set", "`unset RANK WORLD_SIZE`"),
            (&[("RANK", "x"), ("WORLD_SIZE", "2")], "RANK=x: must be a whole number", "`unset RANK WORLD_SIZE`"),
            (
                &[("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a")],
                "MASTER_PORT is not set",
                "`unset RANK WORLD_SIZE MASTER_ADDR`",
            ),
        ] {
            let message = find(false, variables).unwrap_err().to_string();
            assert!(message.starts_with(problem) && message.contains(unset), "{message}");
            assert!(!message.contains("--ddp"), "nobody gave --ddp: {message}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for name in ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"] {
            for nothing in [None, Some(""), Some(" ")] {
                let error = read(&[(name, nothing)]).unwrap_err();
                assert!(error.to_string().starts_with(&format!("{name} is not set")), "{error}");
            }
        }
        for (name, value) in [
            ("RANK", "4"),
            ("RANK", "-1"),
            ("LOCAL_RANK", "2"),
            ("WORLD_SIZE", "0"),
            ("WORLD_SIZE", "two"),
            ("MASTER_PORT", "0"),
            ("MASTER_PORT", "65536"),
            ("TORCHELASTIC_RESTART_COUNT", "x"),
        ] {
            let error = read(&[(name, Some(value))]).unwrap_err();
            assert!(error.to_string().starts_with(&format!("{name}={value}: ")), "{error}");
        }
    }
}
