//! `bbt launch`: what its ranks are told and say, and that they end together. The ranks are scripts of bash.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::common::cli::{Done, Running, Workspace};

/// Waits until the test makes the file `go`.
const AWAIT_GO: &str = "until [ -e go ]; do sleep 0.01; done";

/// `bbt launch` with these flags and `script` as every rank's program.
fn launch(ws: &Workspace, flags: &str, script: &str) -> Command {
    let words = ["launch", "--program", "bash"].into_iter().chain(flags.split_whitespace()).chain(["--", "-c", script]);
    let mut command = ws.command(&words.map(OsStr::new).collect::<Vec<_>>());
    command.env_remove("SLURM_JOB_ID");
    command
}

fn run(ws: &Workspace, flags: &str, script: &str) -> Done {
    Running::start(launch(ws, flags, script)).wait()
}

/// Whether the process whose id is in the file `name`, or soon will be, is there, and not only as a zombie.
fn alive(ws: &Workspace, name: &str) -> bool {
    let pid = ws.read(name);
    if !pid.ends_with('\n') {
        return true;
    }
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(['Z', 'X']))
}

/// Waits until the processes whose ids are in these files have gone.
fn assert_gone(ws: &Workspace, names: &[&str]) {
    let began = Instant::now();
    for name in names {
        while alive(ws, name) {
            assert!(began.elapsed() < Duration::from_secs(120), "{name} is still there");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Waits until these files are there.
fn until_there(ws: &Workspace, running: &mut Running, names: &[&str]) {
    running.until(&names.join(", "), |_| names.iter().all(|name| ws.path(name).exists()));
}

/// The lines of one rank in `text`, in their order.
fn lines_of(text: &str, rank: usize) -> Vec<&str> {
    text.lines().filter_map(|line| line.strip_prefix(&format!("[rank{rank}]: "))).collect()
}

// --- what ranks are told --------------------------------------------------------------------------

/// The environment that a rank has written to the file `name`.
fn environment(ws: &Workspace, name: &str) -> BTreeMap<String, String> {
    let pairs = fs::read(ws.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    let pairs = String::from_utf8_lossy(&pairs).into_owned();
    pairs.split('\0').filter_map(|pair| pair.split_once('=')).map(|(k, v)| (k.into(), v.into())).collect()
}

#[test]
fn every_rank_gets_torchruns_variables() {
    let ws = Workspace::new();
    let script = "env -0 > env.$RANK; readlink /proc/$$/fd/0 > stdin.$RANK";
    let mut command = launch(&ws, "--nproc-per-node 3", script);
    command.env_remove("OMP_NUM_THREADS").env("INHERITED", "yes");
    let done = Running::start(command).wait();
    assert_eq!((done.status, done.text().as_str(), done.stderr.as_str()), (Some(0), "", ""));
    let port = environment(&ws, "env.0")["MASTER_PORT"].clone();
    assert!(port.parse::<u16>().is_ok_and(|port| port > 0), "{port}");
    let threads = (std::thread::available_parallelism().expect("a number").get() / 3).max(1).to_string();
    for rank in ["0", "1", "2"] {
        let env = environment(&ws, &format!("env.{rank}"));
        for (name, value) in [
            ("RANK", rank),
            ("LOCAL_RANK", rank),
            ("WORLD_SIZE", "3"),
            ("LOCAL_WORLD_SIZE", "3"),
            ("GROUP_RANK", "0"),
            ("GROUP_WORLD_SIZE", "1"),
            ("ROLE_RANK", rank),
            ("ROLE_WORLD_SIZE", "3"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", &port),
            ("TORCHELASTIC_RESTART_COUNT", "0"),
            ("TORCHELASTIC_MAX_RESTARTS", "0"),
            ("TORCHELASTIC_RUN_ID", "none"),
            ("TORCHELASTIC_USE_AGENT_STORE", "True"),
            ("OMP_NUM_THREADS", &threads),
            ("INHERITED", "yes"),
        ] {
            assert_eq!(env.get(name).map(String::as_str), Some(value), "{name} of rank {rank}");
        }
        assert_eq!(ws.read(&format!("stdin.{rank}")), "/dev/null\n");
    }
    // Its own number of threads is the user's.
    let mut command = launch(&ws, "", "echo $OMP_NUM_THREADS");
    command.env("OMP_NUM_THREADS", "7");
    assert_eq!(Running::start(command).wait().text(), "7\n");
}

#[test]
fn two_nodes_on_one_machine() {
    let ws = Workspace::new();
    let port = TcpListener::bind(("0.0.0.0", 0)).and_then(|free| free.local_addr()).expect("a port").port();
    let script = format!("env -0 > env.$RANK.part; mv env.$RANK.part env.$RANK; {AWAIT_GO}");
    let node = |node: u32| {
        let flags =
            format!("--nnodes 2 --node_rank {node} --master-addr 127.0.0.1 --master_port {port} --nproc_per_node 2");
        Running::start(launch(&ws, &flags, &script))
    };
    let mut nodes = [node(1), node(0)];
    until_there(&ws, &mut nodes[0], &["env.2", "env.3"]);
    until_there(&ws, &mut nodes[1], &["env.0", "env.1"]);
    ws.write("go", "");
    for node in nodes {
        assert_eq!(node.wait().status, Some(0));
    }
    for rank in 0..4 {
        let env = environment(&ws, &format!("env.{rank}"));
        let told = ["RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"];
        let told = told.map(|name| env[name].parse::<u32>().expect(name));
        assert_eq!(told, [rank, rank % 2, rank / 2, 4, 2, 2]);
        assert_eq!((env["MASTER_ADDR"].as_str(), env["MASTER_PORT"].as_str()), ("127.0.0.1", &*port.to_string()));
    }
}

#[test]
fn slurm_says_what_flags_do_not() {
    let ws = Workspace::new();
    let step = |tasks: &str, script: &str| {
        let mut command = launch(&ws, "--nproc-per-node 2", script);
        command.env("SLURM_JOB_ID", "1").env("SLURM_NNODES", "2").env("SLURM_STEP_NUM_TASKS", tasks);
        command.env("SLURM_NODEID", "1").env("SLURM_STEP_NODELIST", "node[03-05,07],gpu1");
        Running::start(command).wait()
    };
    let script = "echo $RANK of $WORLD_SIZE at $MASTER_ADDR:$MASTER_PORT";
    let text = step("2", script).text();
    assert_eq!(lines_of(&text, 2), ["2 of 4 at node03:29500"]);
    assert_eq!(lines_of(&text, 3), ["3 of 4 at node03:29500"]);
    // One task a GPU is not one launcher a node.
    assert_eq!(lines_of(&step("16", "echo $RANK of $WORLD_SIZE").text(), 1), ["1 of 2"]);
    let done = step("two", script);
    assert_eq!(done.status, Some(1));
    assert!(done.stderr.contains("SLURM_STEP_NUM_TASKS is \"two\""), "{}", done.stderr);
}

// --- what ranks say -------------------------------------------------------------------------------

#[test]
fn lines_stay_whole_however_long_and_many() {
    const LONG: usize = 1 << 20;
    let ws = Workspace::new();
    // Each line is one digit, the rank's, and comes in pieces.
    let script = "
        long=$(head -c 1048576 /dev/zero | tr '\\0' $RANK)
        for i in 1 2 3; do
            printf '%s' \"${long:0:500000}\"; printf '%s\\n' \"${long:500000}\"
            for j in {1..300}; do echo $RANK; echo $RANK$RANK >&2; done
        done";
    let flags = "--nproc-per-node 3";
    let mut joined = ws.shell(&format!("bbt launch --program bash {flags} -- -c \"$SCRIPT\" 2>&1 | cat"));
    joined.env("SCRIPT", script).env_remove("SLURM_JOB_ID");
    let joined = Running::start(joined).wait();
    let apart = run(&ws, flags, script);
    for (done, lengths) in
        [(&joined, [(1, 900), (2, 900), (LONG, 3)].as_slice()), (&apart, [(1, 900), (LONG, 3)].as_slice())]
    {
        assert_eq!(done.status, Some(0), "{}", done.stderr);
        let text = done.text();
        for rank in 0..3 {
            let mut counts = BTreeMap::new();
            for line in lines_of(&text, rank) {
                assert!(line.bytes().all(|byte| byte == b'0' + rank as u8), "rank {rank}: {line:.100}");
                *counts.entry(line.len()).or_insert(0) += 1;
            }
            assert_eq!(counts.into_iter().collect::<Vec<_>>(), lengths, "rank {rank}");
        }
        assert_eq!(text.lines().count(), 3 * lengths.iter().map(|(_, count)| count).sum::<usize>());
    }
    assert_eq!(lines_of(&apart.stderr, 1), ["11"; 900]);
}

#[test]
fn bytes_pass_as_they_are_and_odd_ends_end_lines() {
    let ws = Workspace::new();
    let script = r"printf '\xff\x00\xc3\n\n\r 1%%\r 2%%\r\nlast'";
    let one = run(&ws, "", script);
    assert_eq!(one.stdout, b"\xff\x00\xc3\n\n 1%\n 2%\nlast\n", "one rank has no prefix");
    let two = run(&ws, "--nproc-per-node 2", &format!("[ $RANK = 0 ] || {script}"));
    assert_eq!(two.stdout, b"[rank1]: \xff\x00\xc3\n[rank1]: \n[rank1]:  1%\n[rank1]:  2%\n[rank1]: last\n");
    assert_eq!((one.status, two.status), (Some(0), Some(0)));
}

#[test]
fn log_files_hold_both_streams_and_rank_0_is_shown() {
    let ws = Workspace::new();
    let script = "echo out $RANK; printf 'err %s' $RANK >&2; exit $(( RANK * ${FAIL:-0} ))";
    let flags = "--nproc-per-node 2 --log_dir logs/run";
    let done = run(&ws, flags, script);
    assert_eq!((done.text().as_str(), done.stderr.as_str()), ("out 0\n", "err 0\n"));
    assert_eq!(ws.names("logs/run"), ["rank-0.log", "rank-1.log"]);
    let sorted = |name: &str| {
        let text = ws.read(name);
        let mut lines: Vec<_> = text.lines().map(String::from).collect();
        lines.sort();
        lines
    };
    assert_eq!(sorted("logs/run/rank-1.log"), ["err 1", "out 1"]);
    // A second run goes on in the same files; a failure is told where nobody looks into them.
    let mut command = launch(&ws, flags, script);
    command.env("FAIL", "5");
    let done = Running::start(command).wait();
    assert_eq!(done.status, Some(5));
    assert!(done.stderr.ends_with("failed with exit status 5:\nerr 1\n"), "{}", done.stderr);
    assert_eq!(sorted("logs/run/rank-1.log"), ["err 1", "err 1", "out 1", "out 1"]);

    let done = run(&ws, "--log-dir tiny.yaml/logs", "echo");
    assert_eq!(done.status, Some(1));
    assert!(done.stderr.contains("tiny.yaml/logs") && done.stderr.contains("--log-dir"), "{}", done.stderr);
}

#[test]
fn a_slow_reader_gets_everything() {
    let ws = Workspace::new();
    let reader = format!("bbt launch --program bash --nproc-per-node 2 -- -c \"$SCRIPT\" | ({AWAIT_GO}; cat)");
    let mut command = ws.shell(&reader);
    command.env_remove("SLURM_JOB_ID");
    // Rank 0 fills the pipe and stands; rank 1 fails all the same, and rank 0 is ended.
    command.env(
        "SCRIPT",
        "echo $$ > pid.$RANK
         if [ $RANK = 0 ]; then for i in {1..100000}; do echo $i; done; touch never; fi
         until [ -s pid.0 ]; do sleep 0.01; done
         exit 3",
    );
    let mut running = Running::start(command);
    until_there(&ws, &mut running, &["pid.0", "pid.1"]);
    running.until("both ended", |_| !alive(&ws, "pid.0") && !alive(&ws, "pid.1"));
    ws.write("go", "");
    let done = running.wait();
    let text = done.text();
    let lines = lines_of(&text, 0);
    assert!(!ws.path("never").exists(), "rank 0 had nowhere to write");
    assert!(lines.iter().zip(1..).all(|(line, i)| *line == i.to_string()), "in order, nothing left out");
    assert!(done.stderr.contains("rank 1 (pid") && done.stderr.contains("failed with exit status 3"), "{done:?}");
}

#[test]
fn a_reader_that_has_seen_enough_ends_the_ranks() {
    let ws = Workspace::new();
    let script = "echo $$ > pid.$RANK; while :; do echo $RANK; done";
    let line = "bbt launch --program bash --nproc-per-node 2 -- -c \"$SCRIPT\" | head -1; echo ${PIPESTATUS[0]}";
    let mut command = ws.shell(line);
    command.env("SCRIPT", script).env_remove("SLURM_JOB_ID");
    let done = Running::start(command).wait();
    let text = done.text();
    let lines: Vec<_> = text.lines().collect();
    assert!(matches!(lines[..], ["[rank0]: 0" | "[rank1]: 1", "0"]), "{lines:?}");
    assert_eq!(done.stderr, "");
    let started: Vec<_> = ["pid.0", "pid.1"]
        .into_iter()
        .filter(|name| fs::read(ws.path(name)).is_ok_and(|pid| !pid.is_empty()))
        .collect();
    assert_gone(&ws, &started);
}

// --- how ranks end --------------------------------------------------------------------------------

#[test]
fn the_first_failure_ends_all_and_is_told_last() {
    let ws = Workspace::new();
    // The others ignore what can be ignored, and have children.
    let script = "
        trap '' TERM INT
        sleep 1000 & echo $! > child.$RANK; echo $$ > pid.$RANK; touch ready.$RANK
        if [ $RANK = 1 ]; then
            until [ -e go ]; do sleep 0.01; done
            for i in {1..25}; do echo line $i >&2; done
            exit 3
        fi
        echo waiting >&2
        wait";
    let mut running = Running::start(launch(&ws, "--nproc-per-node 3", script));
    until_there(&ws, &mut running, &["ready.0", "ready.1", "ready.2"]);
    let pid = ws.read("pid.1");
    running.until("both say so", |running| running.stderr().matches("waiting").count() == 2);
    ws.write("go", "");
    let done = running.wait();
    assert_eq!(done.status, Some(3));
    let last: Vec<_> = (6..=25).map(|i| format!("line {i}\n")).collect();
    let told = format!("bbt: rank 1 (pid {}) failed with exit status 3:\n{}", pid.trim(), last.concat());
    assert!(done.stderr.ends_with(&told), "{}", done.stderr);
    assert_eq!(lines_of(&done.stderr, 1).len(), 25, "all of it was passed on before");
    assert_gone(&ws, &["pid.0", "pid.1", "pid.2", "child.0", "child.1", "child.2"]);
}

#[test]
fn of_several_failures_the_one_that_says_why_is_told() {
    let ws = Workspace::new();
    let script = format!(
        "echo $$ > pid.$RANK; touch ready.$RANK; {AWAIT_GO}
         [ $RANK = 2 ] && {{ echo why >&2; exit 5; }}
         exit 4"
    );
    let mut running = Running::start(launch(&ws, "--nproc-per-node 3", &script));
    until_there(&ws, &mut running, &["ready.0", "ready.1", "ready.2"]);
    // All three fail before the launcher can notice.
    running.signal("STOP");
    ws.write("go", "");
    running.until("all ended", |_| ["pid.0", "pid.1", "pid.2"].iter().all(|name| !alive(&ws, name)));
    running.signal("CONT");
    let done = running.wait();
    assert_eq!(done.status, Some(5), "{}", done.stderr);
    assert!(done.stderr.ends_with("failed with exit status 5:\nwhy\n"), "{}", done.stderr);
}

#[test]
fn death_by_a_signal_is_128_and_its_number() {
    let ws = Workspace::new();
    let done = run(&ws, "--nproc-per-node 2", "[ $RANK = 0 ] && exec sleep 1000; kill -9 $$");
    assert_eq!(done.status, Some(137));
    let last = done.stderr.lines().last().expect("a line");
    assert!(last.starts_with("bbt: rank 1 (pid ") && last.ends_with(") was killed by SIGKILL (signal 9)"), "{last}");
}

#[test]
fn a_rank_that_is_done_waits_for_no_other() {
    let ws = Workspace::new();
    let script = format!("[ $RANK = 0 ] && exit 0; {AWAIT_GO}; echo later");
    let mut running = Running::start(launch(&ws, "--nproc-per-node 2", &format!("touch ready.$RANK; {script}")));
    until_there(&ws, &mut running, &["ready.0", "ready.1"]);
    ws.write("go", "");
    let done = running.wait();
    assert_eq!((done.status, done.text().as_str()), (Some(0), "[rank1]: later\n"));
}

#[test]
fn what_a_rank_leaves_does_not_hold_the_launcher() {
    let ws = Workspace::new();
    // One child stays in the rank's group and is ended; one leaves it, and keeps the pipes.
    let script = "sleep 1000 & echo $! > child; setsid bash -c 'echo $$ > daemon; exec sleep 1000' &
                  until [ -s daemon ]; do sleep 0.01; done; echo done";
    let done = run(&ws, "", script);
    assert_eq!((done.status, done.text().as_str()), (Some(0), "done\n"));
    assert_gone(&ws, &["child"]);
    assert!(alive(&ws, "daemon"));
    let ended = Command::new("bash").args(["-c", &format!("kill -9 {}", ws.read("daemon"))]).status();
    assert!(ended.expect("bash").success());
}

#[test]
fn killing_the_launcher_kills_the_ranks() {
    let ws = Workspace::new();
    let script = "echo $$ > pid.$RANK; touch ready.$RANK; trap '' HUP INT TERM; while :; do sleep 0.01; done";
    let mut running = Running::start(launch(&ws, "--nproc-per-node 3", script));
    until_there(&ws, &mut running, &["ready.0", "ready.1", "ready.2"]);
    running.kill();
    assert_gone(&ws, &["pid.0", "pid.1", "pid.2"]);
}

// --- signals --------------------------------------------------------------------------------------

/// Two ranks that count signals, each count a file, until the test makes the file `go`.
fn counting(ws: &Workspace) -> Running {
    let script = format!(
        "n=0; count() {{ n=$((n + 1)); touch $1.$n.$RANK; }}
         trap 'count INT' INT; trap 'count TERM' TERM; trap 'count HUP' HUP
         touch ready.$RANK; {AWAIT_GO}; echo $n"
    );
    let mut command = launch(ws, "--nproc-per-node 2", &script);
    // A group of its own, as a shell gives it.
    command.process_group(0);
    let mut running = Running::start(command);
    until_there(ws, &mut running, &["ready.0", "ready.1"]);
    running
}

#[test]
fn a_signal_reaches_every_rank_once() {
    for (sent, got, to_group) in
        [("INT", "INT", false), ("INT", "INT", true), ("TERM", "TERM", true), ("HUP", "TERM", false)]
    {
        let ws = Workspace::new();
        let mut running = counting(&ws);
        if to_group {
            let sent = Command::new("bash").args(["-c", &format!("kill -{sent} -- -{}", running.pid())]).status();
            assert!(sent.expect("bash").success());
        } else {
            running.signal(sent);
        }
        until_there(&ws, &mut running, &[&format!("{got}.1.0"), &format!("{got}.1.1")]);
        // The ranks take their time, and end well.
        ws.write("go", "");
        let done = running.wait();
        assert_eq!(done.status, Some(0), "{sent}: {}", done.stderr);
        let text = done.text();
        assert_eq!((lines_of(&text, 0), lines_of(&text, 1)), (vec!["1"], vec!["1"]), "{sent}");
    }
}

#[test]
fn the_second_signal_is_passed_on_and_the_third_kills() {
    let ws = Workspace::new();
    let mut running = counting(&ws);
    running.signal("INT");
    until_there(&ws, &mut running, &["INT.1.0", "INT.1.1"]);
    running.signal("TERM");
    until_there(&ws, &mut running, &["TERM.2.0", "TERM.2.1"]);
    running.signal("INT");
    let done = running.wait();
    assert_eq!(done.status, Some(130));
    assert_eq!(done.stderr, "bbt: killed all ranks at the third signal (SIGINT)\n");
}

#[test]
fn a_rank_that_a_signal_ends_has_failed() {
    let ws = Workspace::new();
    let script = "touch ready.$RANK; [ $RANK = 0 ] && trap '' TERM; exec sleep 1000";
    let mut running = Running::start(launch(&ws, "--nproc-per-node 2", script));
    until_there(&ws, &mut running, &["ready.0", "ready.1"]);
    running.signal("TERM");
    let done = running.wait();
    assert_eq!(done.status, Some(143));
    assert!(done.stderr.contains("was killed by SIGTERM (signal 15)"), "{}", done.stderr);
}

#[test]
fn nohup_holds() {
    let ws = Workspace::new();
    let mut command =
        ws.shell(&format!("trap '' HUP; exec bbt launch --program bash -- -c 'touch ready; {AWAIT_GO}; echo done'"));
    command.env_remove("SLURM_JOB_ID");
    let mut running = Running::start(command);
    until_there(&ws, &mut running, &["ready"]);
    running.signal("HUP");
    ws.write("go", "");
    let done = running.wait();
    assert_eq!((done.status, done.text().as_str()), (Some(0), "done\n"));
}

// --- this executable, and what cannot be launched -------------------------------------------------

#[test]
fn the_ranks_are_this_executable() {
    let ws = Workspace::new();
    let done = ws.ok("launch -- train --config tiny.yaml");
    assert!(done.stderr.contains("done: 6 steps"), "{}", done.stderr);
    assert!(ws.path("run/ckpt.pt").exists());
    let alone = ws.bbt("train --config nothing.yaml");
    let done = ws.bbt("launch --nproc-per-node 2 -- train --config nothing.yaml");
    assert_eq!(done.status, alone.status);
    // Rank 0 tells it, unless the machine kept it from starting as early as the other one.
    let told = done.stderr.replace("bbt: rank 1: ", "bbt: ");
    assert!(told.contains("[rank") && told.ends_with(&alone.stderr), "{}", done.stderr);
}

#[test]
fn a_port_in_use_is_named() {
    let ws = Workspace::new();
    let taken = TcpListener::bind(("0.0.0.0", 0)).expect("a port");
    let port = taken.local_addr().expect("an address").port();
    let done = run(&ws, &format!("--master-port {port}"), "touch started");
    assert_eq!(done.status, Some(1));
    assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);
    assert!(done.stderr.contains(&port.to_string()) && done.stderr.contains("--master-port"), "{}", done.stderr);
    assert!(!ws.path("started").exists());
}

#[test]
fn what_cannot_be_launched_says_so() {
    let ws = Workspace::new();
    for (line, word) in [
        ("launch", "after `--`"),
        ("launch --nproc-per-node 2 --", "after `--`"),
        ("launch -- eval --ckpt golden.pt", "only `train`"),
        ("launch -- bbt train", "only `train`"),
        ("launch train", "-- <COMMAND>"),
        ("launch --nproc-per-node 0 -- train", "at least 1"),
        ("launch --nnodes 0 -- train", "--nnodes"),
        ("launch --nnodes 2 --node-rank 2 --master-addr a -- train", "--node-rank 2"),
    ] {
        let mut command = ws.command(&line.split_whitespace().map(OsStr::new).collect::<Vec<_>>());
        command.env_remove("SLURM_JOB_ID");
        let done = Running::start(command).wait();
        assert_eq!(done.status, Some(2), "{line}: {}", done.stderr);
        assert!(done.stderr.contains(word), "{line}: {}", done.stderr);
    }
    let done = ws.bbt("launch --nproc-per-node 2 --program nowhere/x -- train");
    assert_eq!(done.status, Some(1));
    assert!(done.stderr.contains("cannot start nowhere/x"), "{}", done.stderr);
}
