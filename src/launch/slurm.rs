//! What Slurm says of a job: how many nodes, which of them this is, who is the first.

use std::str::FromStr;

use super::LaunchError;

/// The nodes of the Slurm step that this launcher is a task of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slurm {
    /// Number of nodes.
    pub nodes: u32,
    /// Which of them this one is, from 0.
    pub node: u32,
    /// The host name of node 0.
    pub first_host: String,
}

impl Slurm {
    /// Reads the environment through `get`. None outside of Slurm, and where the launcher does not run once per
    /// node: under `srun` with several tasks a node, or in a batch script without `srun`, which runs on the first
    /// node alone.
    ///
    /// # Errors
    /// A variable is missing or malformed.
    pub fn read(get: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, LaunchError> {
        // Only srun sets the number of tasks of a step; SLURM_NTASKS_PER_NODE is there in a batch script, too.
        if get("SLURM_JOB_ID").is_none() || get("SLURM_STEP_NUM_TASKS").is_none() {
            return Ok(None);
        }
        // The step's own where there are: srun may use less than the job has.
        let nodes = ["SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES"];
        let nodes: u32 = number(&get, &nodes, "--nnodes")?;
        let tasks: u32 = number(&get, &["SLURM_STEP_NUM_TASKS"], "--nnodes")?;
        if tasks != nodes {
            return Ok(None);
        }
        let node = number(&get, &["SLURM_NODEID"], "--node-rank")?;
        let (name, list) = first_set(&get, &["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"]);
        let first_host = list.as_deref().and_then(first_host).ok_or(LaunchError::Slurm {
            name,
            value: list,
            expected: "a list of nodes",
            flag: "--master-addr",
        })?;
        Ok(Some(Self { nodes, node, first_host }))
    }
}

/// The first of the variables `names` that is set; else the last one's name.
fn first_set(get: impl Fn(&str) -> Option<String>, names: &[&'static str]) -> (&'static str, Option<String>) {
    let set = names.iter().find_map(|name| Some((*name, Some(get(name)?))));
    set.unwrap_or((names[names.len() - 1], None))
}

fn number<T: FromStr>(
    get: impl Fn(&str) -> Option<String>,
    names: &[&'static str],
    flag: &'static str,
) -> Result<T, LaunchError> {
    let (name, value) = first_set(get, names);
    let number = value.as_deref().and_then(|value| value.trim().parse().ok());
    number.ok_or(LaunchError::Slurm { name, value, expected: "a number", flag })
}

/// The first host of a list such as `node[03-05,07],gpu1`.
fn first_host(list: &str) -> Option<String> {
    let mut host = String::new();
    let mut rest = list.trim();
    while let Some(at) = rest.find(['[', ',']) {
        host.push_str(&rest[..at]);
        if rest.as_bytes()[at] == b',' {
            rest = "";
            break;
        }
        // Of `[03-05,07]` the 03.
        let (ranges, after) = rest[at + 1..].split_once(']')?;
        host.push_str(ranges.split(['-', ',']).next()?);
        rest = after;
    }
    host.push_str(rest);
    Some(host).filter(|host| !host.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_host_of_a_list() {
        for (list, host) in [
            ("gpu1", "gpu1"),
            ("gpu1,gpu2", "gpu1"),
            ("gpu1,node[03-05]", "gpu1"),
            ("node[03-05,07],gpu1", "node03"),
            ("node[7,9]", "node7"),
            ("node[001-128]", "node001"),
            ("rack[2-3]-n[04-05,08],x", "rack2-n04"),
            ("node[1-2]-ib,node3", "node1-ib"),
            ("a-b.example.org", "a-b.example.org"),
        ] {
            assert_eq!(first_host(list).as_deref(), Some(host), "{list}");
        }
        for list in ["", ",", "node[1"] {
            assert_eq!(first_host(list), None, "{list}");
        }
    }

    const STEP: [(&str, &str); 5] = [
        ("SLURM_JOB_ID", "7"),
        ("SLURM_NNODES", "2"),
        ("SLURM_STEP_NUM_TASKS", "2"),
        ("SLURM_NODEID", "1"),
        ("SLURM_JOB_NODELIST", "n[08-09]"),
    ];

    /// What is read of `STEP` with these variables set, or unset where they are empty.
    fn read(changes: &[(&str, &str)]) -> Result<Option<Slurm>, String> {
        let get = |name: &str| {
            let found = changes.iter().chain(&STEP).find(|(key, _)| *key == name);
            found.map(|(_, value)| value.to_string()).filter(|value| !value.is_empty())
        };
        Slurm::read(get).map_err(|error| error.to_string())
    }

    #[test]
    fn a_step_with_a_task_a_node_says_it_all() {
        let slurm = |nodes, node, first_host: &str| Ok(Some(Slurm { nodes, node, first_host: first_host.into() }));
        assert_eq!(read(&[]), slurm(2, 1, "n08"));
        assert_eq!(read(&[("SLURM_NNODES", ""), ("SLURM_JOB_NUM_NODES", "2")]), slurm(2, 1, "n08"));
        // A step on some of the job's nodes.
        let step = [("SLURM_NNODES", "3"), ("SLURM_STEP_NUM_NODES", "2"), ("SLURM_STEP_NODELIST", "n[09,11]")];
        assert_eq!(read(&step), slurm(2, 1, "n09"));
    }

    #[test]
    fn otherwise_it_says_nothing() {
        for change in [("SLURM_JOB_ID", ""), ("SLURM_STEP_NUM_TASKS", "16"), ("SLURM_STEP_NUM_TASKS", "")] {
            assert_eq!(read(&[change]), Ok(None), "{change:?}");
        }
        assert_eq!(read(&[("SLURM_STEP_NUM_TASKS", ""), ("SLURM_NTASKS_PER_NODE", "1")]), Ok(None), "no srun");
    }

    #[test]
    fn errors_name_the_variable_and_the_flag() {
        for (change, words) in [
            (("SLURM_NNODES", "two"), "SLURM_NNODES is \"two\", not a number: give --nnodes"),
            (("SLURM_NODEID", ""), "SLURM_NODEID is not set, not a number: give --node-rank"),
            (("SLURM_JOB_NODELIST", "n[1"), "SLURM_JOB_NODELIST is \"n[1\", not a list of nodes: give --master-addr"),
        ] {
            assert_eq!(read(&[change]), Err(words.into()));
        }
    }
}
