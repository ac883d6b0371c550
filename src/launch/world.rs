//! The shape of a run, and what each rank is told of it.

/// Nodes × processes on each, and where they meet.
#[derive(Debug, Clone)]
pub struct World {
    /// Number of nodes, at least 1.
    pub nodes: u32,
    /// Which of them this one is, from 0.
    pub node: u32,
    /// Number of ranks on each node, at least 1.
    pub local: u32,
    /// Host of the store that all ranks meet at: node 0.
    pub master_addr: String,
    /// Its port.
    pub master_port: u16,
}

impl World {
    /// Number of ranks on all nodes.
    pub fn size(&self) -> u64 {
        u64::from(self.nodes) * u64::from(self.local)
    }

    /// The rank of this node's `local_rank`-th process.
    pub fn rank(&self, local_rank: u32) -> u64 {
        u64::from(self.node) * u64::from(self.local) + u64::from(local_rank)
    }

    /// The environment variables that torchrun sets for this node's `local_rank`-th process.
    pub fn variables(&self, local_rank: u32) -> Vec<(&'static str, String)> {
        let (rank, size) = (self.rank(local_rank), self.size());
        vec![
            ("RANK", rank.to_string()),
            ("LOCAL_RANK", local_rank.to_string()),
            ("WORLD_SIZE", size.to_string()),
            ("LOCAL_WORLD_SIZE", self.local.to_string()),
            ("GROUP_RANK", self.node.to_string()),
            ("GROUP_WORLD_SIZE", self.nodes.to_string()),
            // Torchrun's roles: there is one, and all ranks have it.
            ("ROLE_NAME", "default".into()),
            ("ROLE_RANK", rank.to_string()),
            ("ROLE_WORLD_SIZE", size.to_string()),
            ("MASTER_ADDR", self.master_addr.clone()),
            ("MASTER_PORT", self.master_port.to_string()),
            ("TORCHELASTIC_RESTART_COUNT", "0".into()),
            ("TORCHELASTIC_MAX_RESTARTS", "0".into()),
            ("TORCHELASTIC_RUN_ID", "none".into()),
            // The launcher of node 0 hosts the store: no rank does.
            ("TORCHELASTIC_USE_AGENT_STORE", "True".into()),
        ]
    }
}
