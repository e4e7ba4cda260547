-- Which requests of a tenant have not ended: `run:<tenant>` is the set of their rids, `tenants` the set of tenants that
-- have any. Limits are kept in the home slot (_limits.lua).

local function begin_request(tenant, rid)
  redis.call('SADD', P .. 'run:' .. tenant, rid)
  redis.call('SADD', P .. 'tenants', tenant)
end
