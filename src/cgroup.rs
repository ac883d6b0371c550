//! What a container, a batch job or a service may use of the machine: the memory and CPU limits of Linux's control
//! groups, version 1 and 2 (<https://docs.kernel.org/admin-guide/cgroup-v2.html>).
//!
//! Groups are nested, and a limit holds for all groups below it. So what counts for this process is the smallest limit
//! on the way from its own group up to the topmost one that is visible.

use std::fs;
use std::path::{Path, PathBuf};

/// The limits of this process.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Limits {
    /// Memory, where it is limited.
    pub memory: Option<MemoryLimit>,
    /// How many CPUs it may keep busy, where that is limited: the quota divided by its period.
    pub cpus: Option<f64>,
}

/// The group that leaves this process the least memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryLimit {
    /// What all of the group's processes may take, in bytes.
    pub limit: u64,
    /// What is left of it, in bytes. Cached files that the kernel can drop count as left.
    pub available: u64,
}

impl Limits {
    /// The number of threads that the CPU limit is worth: rounded down, at least 1.
    pub fn threads(&self) -> Option<usize> {
        self.cpus.map(|cpus| (cpus as usize).max(1))
    }
}

/// The limits of this process; none where the system does not say.
pub fn limits() -> Limits {
    limits_below(Path::new("/"))
}

/// The same, of the system whose files are below `root`.
fn limits_below(root: &Path) -> Limits {
    let read = |name: &str| fs::read_to_string(root.join("proc/self").join(name)).unwrap_or_default();
    let (groups, mounts) = (read("cgroup"), read("mountinfo"));
    let mut limits = Limits::default();
    for hierarchy in mounts.lines().filter_map(Hierarchy::parse) {
        for group in hierarchy.groups(&groups, root) {
            if let Some(found) = hierarchy.memory(&group)
                && limits.memory.is_none_or(|least| found.available < least.available)
            {
                limits.memory = Some(found);
            }
            if let Some(found) = hierarchy.cpus(&group)
                && limits.cpus.is_none_or(|least| found < least)
            {
                limits.cpus = Some(found);
            }
        }
    }
    limits
}

/// A tree of groups: version 2 has one, version 1 one for each controller or few of them.
struct Hierarchy {
    /// Its controllers; none: version 2, which has all.
    controllers: Option<Vec<String>>,
    /// The group that is seen at the mount point: in a container, often the container's own.
    root: PathBuf,
    mount_point: PathBuf,
}

impl Hierarchy {
    /// A line of `/proc/self/mountinfo`:
    /// `35 31 0:32 /docker/1f /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory`.
    fn parse(line: &str) -> Option<Self> {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let (root, mount_point) = (unescaped(mount.next()?), unescaped(mount.next()?));
        let mut filesystem = filesystem.split(' ');
        let controllers = match filesystem.next()? {
            "cgroup2" => None,
            "cgroup" => Some(filesystem.nth(1)?.split(',').map(String::from).collect()),
            _ => return None,
        };
        Some(Self { controllers, root, mount_point })
    }

    fn has(&self, controller: &str) -> bool {
        self.controllers.as_ref().is_none_or(|controllers| controllers.iter().any(|name| name == controller))
    }

    /// The directories of this process's group and of those above it, as `/proc/self/cgroup` names it: `4:memory:/job`
    /// or `0::/job`.
    fn groups(&self, of_process: &str, root: &Path) -> Vec<PathBuf> {
        let path = of_process.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            let same = match &self.controllers {
                None => controllers.is_empty(),
                Some(own) => controllers.split(',').any(|name| own.iter().any(|own| own == name)),
            };
            same.then(|| PathBuf::from(path))
        });
        let top = root.join(self.mount_point.strip_prefix("/").unwrap_or(&self.mount_point));
        // A group that the mount does not show, as in another namespace: what it shows is the nearest to it.
        let below = path.as_deref().and_then(|path| path.strip_prefix(&self.root).ok()).unwrap_or(Path::new(""));
        below.ancestors().map(|path| top.join(path)).collect()
    }

    fn memory(&self, group: &Path) -> Option<MemoryLimit> {
        let (limit, used, cached) = match self.controllers {
            None => ("memory.max", "memory.current", "inactive_file"),
            Some(_) if self.has("memory") => ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            Some(_) => return None,
        };
        // Version 1 says "no limit" with a number near 2^63.
        let limit = number(group, limit).filter(|&limit| limit < 1 << 60)?;
        let statistics = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
        let cached = statistics.lines().find_map(|line| line.strip_prefix(cached)?.trim().parse().ok()).unwrap_or(0);
        let used = number(group, used).unwrap_or(0).saturating_sub(cached);
        Some(MemoryLimit { limit, available: limit.saturating_sub(used) })
    }

    fn cpus(&self, group: &Path) -> Option<f64> {
        let (quota, period) = match self.controllers {
            None => {
                // `50000 100000`, or `max 100000`.
                let text = fs::read_to_string(group.join("cpu.max")).ok()?;
                let (quota, period) = text.trim().split_once(' ')?;
                (quota.parse().ok()?, period.parse().ok()?)
            }
            // -1, which is no such number, where there is none.
            Some(_) if self.has("cpu") => (number(group, "cpu.cfs_quota_us")?, number(group, "cpu.cfs_period_us")?),
            Some(_) => return None,
        };
        (quota > 0 && period > 0).then(|| quota as f64 / period as f64)
    }
}

fn number(group: &Path, file: &str) -> Option<u64> {
    fs::read_to_string(group.join(file)).ok()?.trim().parse().ok()
}

/// A path in mountinfo, where blanks and the like are written in octal.
fn unescaped(path: &str) -> PathBuf {
    let mut text = path.to_string();
    for (code, meant) in [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")] {
        text = text.replace(code, meant);
    }
    text.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// A system with these files.
    fn system(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    const V2: &str = "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
    const V1: &str = "\
31 23 0:28 / /sys/fs/cgroup ro shared:8 - tmpfs tmpfs ro,mode=755\n\
32 31 0:29 /docker/1f /sys/fs/cgroup/cpu,cpuacct ro shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
35 31 0:32 /docker/1f /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n\
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";

    #[test]
    fn without_groups_or_limits_nothing_is_limited() {
        assert_eq!(limits_below(system(&[]).path()), Limits::default());
        let root = system(&[
            ("proc/self/mountinfo", V2),
            ("proc/self/cgroup", "0::/job\n"),
            ("sys/fs/cgroup/job/memory.max", "max\n"),
            ("sys/fs/cgroup/job/cpu.max", "max 100000\n"),
        ]);
        assert_eq!(limits_below(root.path()), Limits::default());
        let root = system(&[
            ("proc/self/mountinfo", V1),
            ("proc/self/cgroup", "4:memory:/docker/1f\n3:cpu,cpuacct:/docker/1f\n0::/\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n"),
            ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n"),
        ]);
        assert_eq!(limits_below(root.path()), Limits::default());
    }

    #[test]
    fn in_version_2_the_smallest_limit_on_the_way_up_counts() {
        let root = system(&[
            ("proc/self/mountinfo", V2),
            ("proc/self/cgroup", "0::/slice/job/task\n"),
            // The task's own limit is wide, the job's is narrow; of the slice others have taken nearly all.
            ("sys/fs/cgroup/slice/job/task/memory.max", &format!("{}\n", 64 * GIB)),
            ("sys/fs/cgroup/slice/job/task/memory.current", &format!("{GIB}\n")),
            ("sys/fs/cgroup/slice/job/memory.max", &format!("{}\n", 8 * GIB)),
            ("sys/fs/cgroup/slice/job/memory.current", &format!("{}\n", 3 * GIB)),
            ("sys/fs/cgroup/slice/job/memory.stat", &format!("anon 5\ninactive_file {GIB}\nactive_file 7\n")),
            ("sys/fs/cgroup/slice/memory.max", &format!("{}\n", 100 * GIB)),
            ("sys/fs/cgroup/slice/memory.current", &format!("{}\n", 20 * GIB)),
            ("sys/fs/cgroup/slice/job/task/cpu.max", "max 100000\n"),
            ("sys/fs/cgroup/slice/job/cpu.max", "250000 100000\n"),
            ("sys/fs/cgroup/slice/cpu.max", "400000 100000\n"),
            // Beside the way up.
            ("sys/fs/cgroup/slice/other/memory.max", "1\n"),
            ("sys/fs/cgroup/slice/other/cpu.max", "1 100000\n"),
        ]);
        let limits = limits_below(root.path());
        assert_eq!(limits.memory, Some(MemoryLimit { limit: 8 * GIB, available: 6 * GIB }));
        assert_eq!((limits.cpus, limits.threads()), (Some(2.5), Some(2)));

        fs::write(root.path().join("sys/fs/cgroup/slice/memory.current"), format!("{}\n", 95 * GIB)).unwrap();
        let memory = limits_below(root.path()).memory;
        assert_eq!(memory, Some(MemoryLimit { limit: 100 * GIB, available: 5 * GIB }), "less is left there");
    }

    #[test]
    fn in_version_1_each_controller_has_its_own_tree() {
        let root = system(&[
            ("proc/self/mountinfo", V1),
            (
                "proc/self/cgroup",
                "9:name=systemd:/docker/1f\n4:memory:/docker/1f/inner\n3:cpu,cpuacct:/docker/1f\n0::/\n",
            ),
            ("sys/fs/cgroup/memory/inner/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", &format!("{}\n", 600 << 20)),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", &format!("{}\n", 500 << 20)),
            ("sys/fs/cgroup/memory/memory.stat", &format!("inactive_file 1\ntotal_inactive_file {}\n", 100 << 20)),
            ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "50000\n"),
            ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n"),
        ]);
        let limits = limits_below(root.path());
        assert_eq!(limits.memory, Some(MemoryLimit { limit: 600 << 20, available: 200 << 20 }));
        assert_eq!((limits.cpus, limits.threads()), (Some(0.5), Some(1)), "half a CPU is worth one thread");
    }

    #[test]
    fn a_group_that_the_mount_does_not_show_is_judged_by_what_it_shows() {
        // The host's path seen from a container that has only its own group mounted.
        let root = system(&[
            ("proc/self/mountinfo", "35 31 0:32 /pod\\040a /groups rw - cgroup2 none rw\n"),
            ("proc/self/cgroup", "0::/../elsewhere\n"),
            ("groups/memory.max", "1000\n"),
            ("groups/memory.current", "1400\n"),
        ]);
        assert_eq!(limits_below(root.path()).memory, Some(MemoryLimit { limit: 1000, available: 0 }));
        let inner = format!("{}/groups/x", root.path().display());
        fs::create_dir_all(&inner).unwrap();
        fs::write(format!("{inner}/memory.max"), "7\n").unwrap();
        fs::write(root.path().join("proc/self/cgroup"), "0::/pod a/x\n").unwrap();
        assert_eq!(limits_below(root.path()).memory, Some(MemoryLimit { limit: 1000, available: 0 }));
        fs::write(root.path().join("groups/memory.current"), "0\n").unwrap();
        assert_eq!(limits_below(root.path()).memory, Some(MemoryLimit { limit: 7, available: 7 }));
    }
}
